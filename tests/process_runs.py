"""Runs of launch/train.py in one or several real processes, made small."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

from ml_collections import ConfigDict

from configs import default

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEARTBEAT = 10  # seconds, for the tests in which a process dies

CHEAP = {
  "data.dataset": "toy_scenes",
  "data.train_split": "train",
  "data.val_split": "test",
  "data.crop": (),
  "data.num_threads": 0,
  "augment.brightness": 0.2,
  "model.image_size": 32,
  "model.num_slots": 4,
  "model.slot_dim": 16,
  "model.num_iterations": 2,
  "model.width": 8,
  "model.encoder": "cnn",
  "model.use_spectral_init": False,
  "model.use_diffusion_decoder": False,
  "model.decoder": "patch_mlp",
  "model.slot_update": "gru",
  "model.decoder_width": 16,
  "mamba_slot.use_gmm_prior": False,
  "mamba_slot.use_spatial_fusion": False,
  "composite.rounds": 0,
  "training.batch_size": 8,
  "logging.log_interval": 1,
  "logging.save_interval": 1000,
  "logging.val_interval": 1000,
  "logging.image_interval": 0,
}
"""Plain slot attention: every mechanism of a run but labels and composites."""

COMPLETE = CHEAP | {
  "model.encoder": "unet",
  "model.use_spectral_init": True,
  "model.use_diffusion_decoder": True,
  "model.slot_update": "ssm",
  "mamba_slot.use_gmm_prior": True,
  "mamba_slot.use_spatial_fusion": True,
  "mamba_slot.d_state": 4,
  "diffusion.width": 16,
  "composite.rounds": 1,
}
"""The default model and objective. One round: a second one is trained on label
maps of the model, which are discrete, and of a model that has learned nothing
yet depend on the last bits of its weights."""


def make_config(fields: dict) -> ConfigDict:
  """configs/default.py with fields set, for a run in this process."""
  config = default.get_config().unlock()
  config.update_from_flattened_dict(fields)
  return config.lock()


def flags(fields: dict, config: str = "configs/default.py") -> list[str]:
  """The same as flags of launch/train.py, on a config."""
  shown = {
    k: ",".join(map(str, v)) if isinstance(v, tuple) else v
    for k, v in fields.items()
    if v != ()
  }
  crop = [] if fields.get("data.crop") != () else ["--config.data.crop=()"]
  return [f"--config={config}", *crop] + [
    f"--config.{name}={value}" for name, value in shown.items()
  ]


def free_port() -> int:
  """A port that nothing listens on."""
  with contextlib.closing(socket.socket()) as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def launch(
  command: list[str],
  *,
  processes: int = 2,
  devices: int = 4,
  missing: int = 0,
  initialization: int = 200,
  heartbeat: int = HEARTBEAT,
  extra: tuple = ((), ()),
) -> list[subprocess.Popen]:
  """Starts the processes of one run, all but the last `missing`.

  `extra` holds the flags that each process has on its own.
  """
  port = free_port()
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
  }
  cluster = [
    f"--coordinator=localhost:{port}",
    f"--num_processes={processes}",
    f"--initialization_timeout={initialization}",
    f"--heartbeat_timeout={heartbeat}",
  ]
  return [
    subprocess.Popen(
      [
        sys.executable,
        *command,
        *cluster,
        f"--process_id={index}",
        *extra[index],
      ],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(processes - missing)
  ]


def finish(running: list[subprocess.Popen], *, timeout: float = 560) -> list:
  """(exit code, stdout, stderr) of each; none is left behind."""
  try:
    texts = [process.communicate(timeout=timeout) for process in running]
  finally:
    for process in running:
      process.kill()
  return [
    (process.returncode, *text)
    for process, text in zip(running, texts, strict=True)
  ]


def train(fields: dict, workdir: pathlib.Path, **options) -> list:
  """Runs launch/train.py in several processes to its end."""
  return finish(start_training(fields, workdir, **options))


def start_training(
  fields: dict,
  workdir: pathlib.Path,
  config: str = "configs/default.py",
  **options,
) -> list:
  """Starts launch/train.py in several processes."""
  command = [
    "launch/train.py",
    *flags(fields, config),
    f"--workdir={workdir}",
  ]
  return launch(command, **options)


def logged(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
  """metrics.jsonl by step, without what depends on the clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return {
    row["step"]: {k: v for k, v in row.items() if "per_second" not in k}
    for row in rows
  }
