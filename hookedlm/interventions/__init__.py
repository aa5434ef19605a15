"""Interventions: what is put in an activation's place, and where; applied, printed and saved."""

from hookedlm.interventions.files import load, save
from hookedlm.interventions.from_runs import Freeze, Mean, Noise, Patch, Resample
from hookedlm.interventions.intervention import Intervention
from hookedlm.interventions.what import Add, ProjectOut, Scale, What, Zero

__all__ = [
    "Add",
    "Freeze",
    "Intervention",
    "Mean",
    "Noise",
    "Patch",
    "ProjectOut",
    "Resample",
    "Scale",
    "What",
    "Zero",
    "load",
    "save",
]
