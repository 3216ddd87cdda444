"""UPF files (version 2.0.1) tabulated from GTH parameters, for Quantum ESPRESSO."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpurho.dft.gth import NAME, free_atom, gth

POINTS, STEP = 1201, 0.01
"""Radial mesh: 0 to 12 Bohr. Quantum ESPRESSO integrates up to 10 Bohr."""


def upf_text(symbol: str) -> str:
    """The UPF file of an element; energies in Rydberg, as the format has it.

    Raises
    ------
    UnknownSpeciesError
        Where no GTH-PBE pseudopotential is published.
    """
    p = gth(symbol)
    r: NDArray[np.floating] = np.arange(POINTS) * STEP
    inner = np.maximum(r, 1e-8)
    atom = free_atom(symbol, POINTS - 1, STEP)
    betas: list[tuple[int, NDArray[np.floating]]] = []
    blocks = []
    for channel in p.channels:
        blocks.append(np.array(channel.h) * 2.0)
        betas += [(channel.l, r * p.projector(channel, i, inner)) for i in range(len(channel.h))]
    coupling = np.zeros((len(betas), len(betas)))
    at = 0
    for block in blocks:
        coupling[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    rho = np.concatenate([[0.0], 4 * np.pi * atom.r**2 * atom.density])

    parts = [
        '<UPF version="2.0.1">',
        f"<PP_INFO>{NAME} of {symbol}, tabulated by gpurho from the published parameters</PP_INFO>",
        f'<PP_HEADER generated="gpurho" author="gpurho" date="" comment="{NAME}" element="{symbol}" pseudo_type="NC"'
        ' relativistic="scalar" is_ultrasoft="F" is_paw="F" is_coulomb="F" has_so="F" has_wfc="F" has_gipaw="F"'
        f' core_correction="F" functional="PBE" z_valence="{p.valence:.1f}" total_psenergy="0.0"'
        f' l_max="{max((ell for ell, _ in betas), default=0)}" l_local="-1" mesh_size="{POINTS}"'
        f' number_of_wfc="{len(atom.orbitals)}" number_of_proj="{len(betas)}"/>',
        f'<PP_MESH dx="0.0" mesh="{POINTS}" xmin="0.0" rmax="{r[-1]:.6f}" zmesh="0.0">',
        _array("PP_R", r),
        _array("PP_RAB", np.full(POINTS, STEP)),
        "</PP_MESH>",
        _array("PP_LOCAL", 2.0 * p.local(inner)),
        "<PP_NONLOCAL>",
        *(
            _array(
                f"PP_BETA.{i + 1}",
                beta,
                f' index="{i + 1}" angular_momentum="{ell}" cutoff_radius_index="{_reach(beta)}"'
                f' cutoff_radius="{STEP * _reach(beta):.4f}"',
            )
            for i, (ell, beta) in enumerate(betas)
        ),
        _array("PP_DIJ", coupling.reshape(-1)),
        "</PP_NONLOCAL>",
        "<PP_PSWFC>",
        *(
            _array(
                f"PP_CHI.{i + 1}",
                np.concatenate([[0.0], u]),
                f' index="{i + 1}" l="{ell}" occupation="{n:.6f}" label="{i + 1}{"SPDF"[ell]}" pseudo_energy="0.0"',
            )
            for i, (ell, n, u) in enumerate(atom.orbitals)
        ),
        "</PP_PSWFC>",
        _array("PP_RHOATOM", rho),
        "</UPF>",
    ]
    return "\n".join(parts) + "\n"


def _reach(beta: NDArray[np.floating]) -> int:
    """Number of mesh points, odd for Simpson's rule, beyond which a projector is nothing."""
    last = int(np.flatnonzero(np.abs(beta) > 1e-12 * np.abs(beta).max())[-1]) + 1
    return min(POINTS, last + 1 - last % 2)


def _array(tag: str, values: NDArray[np.floating], attributes: str = "") -> str:
    rows = [" ".join(f"{v:.14E}" for v in values[i : i + 4]) for i in range(0, len(values), 4)]
    return f'<{tag} type="real" size="{len(values)}" columns="4"{attributes}>\n' + "\n".join(rows) + f"\n</{tag}>"
