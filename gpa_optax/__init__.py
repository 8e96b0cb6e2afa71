"""Generalized Primal Averaging (GPA) for Optax.

`gpa` wraps any Optax optimizer and averages its iterates smoothly at every step;
`eval_params` gives the averaged weights to evaluate, export or serve. The method is from
Defazio et al., *Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs*
(https://arxiv.org/abs/2512.17131).
"""

from gpa_optax import averaging
from gpa_optax._aliases import (
    annealed_adamw,
    anytime_adamw,
    gpa_adamw,
    gpa_lion,
    gpa_muon,
    gpa_sgd,
)
from gpa_optax._diloco import SingleWorkerDiLoCoState, single_worker_diloco
from gpa_optax._gpa import GPAState, gpa
from gpa_optax._iterates import Iterates, eval_params, iterates
from gpa_optax._trainers import EndAtXState, check_step, end_at_x

__version__ = "0.1.0"

__all__ = [
    "EndAtXState",
    "GPAState",
    "Iterates",
    "SingleWorkerDiLoCoState",
    "annealed_adamw",
    "anytime_adamw",
    "averaging",
    "check_step",
    "end_at_x",
    "eval_params",
    "gpa",
    "gpa_adamw",
    "gpa_lion",
    "gpa_muon",
    "gpa_sgd",
    "iterates",
    "single_worker_diloco",
]
