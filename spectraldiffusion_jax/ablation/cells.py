"""The literal table of cells: the guide's phases, and the full model less one.

A cell is a name and the fields it sets in the config it is given. Phase 5 of
the guide is that config itself, the cell `full`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from spectraldiffusion_jax.errors import UserError, choose

PLAIN = {
  "composite.rounds": 0,
  "model.use_spectral_init": False,
  "model.use_diffusion_decoder": False,
  "model.decoder": "patch_mlp",
  "model.encoder": "cnn",
  "model.token_stride": 4,
  "model.slot_update": "gru",
  "model.stickiness": 0.0,
  "mamba_slot.use_gmm_prior": False,
  "mamba_slot.use_spatial_fusion": False,
}
"""Slot attention as it was published (Locatello et al. 2020) on a budget."""

SPECTRAL = PLAIN | {"model.use_spectral_init": True}
MAMBA = SPECTRAL | {
  "model.slot_update": "ssm",
  "mamba_slot.use_gmm_prior": True,
  "mamba_slot.key_dim": 16,
}
DIFFUSION = MAMBA | {"model.use_diffusion_decoder": True}


class Cell(NamedTuple):
  """One row of the table."""

  name: str
  fields: Mapping[str, Any]  # "section.field" -> value
  note: str  # what the fields mean, and where the masks then come from


FULL = "full"
_ROWS = (
  ("phase1", PLAIN, "random slots, GRU, mixture decoder, whose masks count"),
  ("phase2", SPECTRAL, "phase 1, slots start from the colour graph's cut"),
  ("phase3", MAMBA, "phase 2, SSM update, Gaussian slots in 16 learned keys"),
  ("phase4", DIFFUSION, "phase 3, diffusion decoder, whose masks count"),
  (FULL, {}, "phase 5: the config; masks are the vote field's E-step"),
  (
    "no_spectral_init",
    {"model.use_spectral_init": False},
    "random foreground tokens start the Gaussian slots; all of them are used",
  ),
  (
    "no_power_iteration",
    {"spectral.use_power_iteration": False},
    "dense eigenvectors in place of the block iteration",
  ),
  (
    "no_chroma",
    {"spectral.chroma_sigma": 0.0},
    "objects are told apart by votes alone, not by votes and chroma",
  ),
  (
    "no_gmm_prior",
    {"mamba_slot.use_gmm_prior": False},
    "dot-product attention, whose token masks count, enlarged and sharpened",
  ),
  (
    "gru_update",
    {"model.slot_update": "gru"},
    "GRU in place of the SSM cell: full M-steps, no gate",
  ),
  (
    "one_iteration",
    {"model.num_iterations": 1},
    "one round of MAP-EM",
  ),
  (
    "no_spatial_fusion",
    {"mamba_slot.use_spatial_fusion": False},
    "no token scan inside the U-Net",
  ),
  (
    "no_diffusion",
    {"model.use_diffusion_decoder": False, "model.decoder": "none"},
    "no decoder at all; masks as in full",
  ),
  (
    "no_gmm_loss",
    {"loss_weights.gmm_prior": 0.0},
    "the learned mixture of all slots is not fitted",
  ),
  (
    "no_consistency_loss",
    {"loss_weights.spectral_consistency": 0.0},
    "attention is not asked for modularity",
  ),
  (
    "no_slot_loss",
    {"loss_weights.slot": 0.0},
    "votes are not asked to win an E-step",
  ),
  (
    "no_sharpening",
    {"model.stickiness": 0.0},
    "outlines as the E-step leaves them",
  ),
  (
    "no_composites",
    {"composite.rate": 0.0, "composite.grey_object": 0.0},
    "labels of the images as they are: nothing pasted, nothing grey",
  ),
  (
    "no_grey",
    {"composite.grey_object": 0.0},
    "composites, but no object turns grey",
  ),
  (
    "one_round",
    {"composite.rounds": 1},
    "labels of the training-free step all the way",
  ),
  (
    "trust_labels",
    {"composite.trust": 1e3},
    "labels that the field contradicts count to the end",
  ),
)
CELLS = {name: Cell(name, fields, note) for name, fields, note in _ROWS}


def choose_cells(
  names: Sequence[str], unfit: Callable[[Cell], str] = lambda cell: ""
) -> list[Cell]:
  """The fitting cells of these names in the table's order, all for none.

  Args:
    names: of cells.
    unfit: why a cell does not fit, "" if it does.

  Raises:
    UserError: there is no cell of a name, or it does not fit.
  """
  for name in names:
    choose("--cells", name, CELLS)
  fitting = []
  for cell in CELLS.values():
    if names and cell.name not in names:
      continue
    if not (reason := unfit(cell)):
      fitting.append(cell)
    elif names:
      raise UserError(f"--cells={cell.name} {reason}")
  return fitting


def choose_changes(config: ConfigDict, names: Sequence[str]) -> list[Cell]:
  """The same without cells that would train `full` again."""
  full = configure(config, CELLS[FULL], config.seed)

  def unfit(cell: Cell) -> str:
    if cell.name == FULL or configure(config, cell, config.seed) != full:
      return ""
    held = ", ".join(f"{name}={value}" for name, value in cell.fields.items())
    return f"changes nothing: the config has {held} already"

  return choose_cells(names, unfit)


def configure(config: ConfigDict, cell: Cell, seed: int) -> ConfigDict:
  """The config of one run of a cell; no pictures are drawn on the way."""
  config = config.copy_and_resolve_references().unlock()
  for name, value in cell.fields.items():
    section, field = name.split(".")
    config[section][field] = value
  config.seed = seed
  config.logging.image_interval = 0
  return config.lock()
