"""Panoptic quality by hand, against a loop over pixel sets, and on COCO."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from spectraldiffusion_jax import metrics, panoptic
from spectraldiffusion_jax.errors import UserError

VOID = 255


def row(text):
  """A one-line panoptic map: "0a 0b 3. ..": class digit, instance letter."""
  parts = text.split()
  category = [VOID if part[0] == "." else int(part[0]) for part in parts]
  return np.array([category]), np.array([[ord(part[1]) for part in parts]])


def score(true, pred, *, crowd=None, **options):
  """Scores with two thing classes 0, 1 and two stuff classes 2, 3."""
  options = {"num_classes": 4, "things": {0, 1}} | options
  table = panoptic.segment_table(*true, *pred, crowd=crowd)
  scores = panoptic.panoptic_scores([table], **options)
  return panoptic.panoptic_quality(scores, things={0, 1}), scores


def scores_by_sets(true, pred, crowd, *, num_classes, things, forgiving):
  """TP, FP, FN and IoU per class from explicit sets of pixels."""

  def segments(category, instance):
    sets = {}
    for index, value in np.ndenumerate(category):
      key = (int(value), int(instance[index]) if value in things else 0)
      sets.setdefault("void" if value == VOID else key, set()).add(index)
    return sets.pop("void", set()), sets

  crowds = {i for i, flag in np.ndenumerate(crowd) if flag}
  void, truths = segments(*true)
  unknown, guesses = segments(*pred)
  whole = {}
  for key, pixels in truths.items():
    if pixels - crowds:
      whole[key] = pixels - crowds
  out = np.zeros((4, num_classes))  # iou, tp, fp, fn
  hits = set()
  for (g, a), (p, b) in itertools.product(whole.items(), guesses.items()):
    union = (a | b) - (void & b) - (unknown & a if forgiving else set())
    if g[0] == p[0] and 2 * len(a & b) > len(union):
      out[0, g[0]] += len(a & b) / len(union)
      out[1, g[0]] += 1
      hits |= {("t", g), ("p", p)}
  for p, b in guesses.items():
    group = {i for k, s in truths.items() if k[0] == p[0] for i in s & crowds}
    if ("p", p) not in hits and 2 * len(b & (void | group)) <= len(b):
      out[2, p[0]] += 1
  for g, a in whole.items():
    forgiven = forgiving and 2 * len(a & unknown) > len(a)
    if ("t", g) not in hits and not forgiven:
      out[3, g[0]] += 1
  return out


def random_maps(seed, shape=(9, 11), num=10):
  """Nearest-seed regions, each with a class (0..3 or void) and an id."""
  rng = np.random.default_rng(seed)
  points = rng.random((num, 2)) * shape
  pixels = np.stack(np.mgrid[: shape[0], : shape[1]], -1)
  region = ((pixels[:, :, None] - points) ** 2).sum(-1).argmin(-1)
  category = rng.choice([0, 0, 1, 1, 2, 3, VOID], num)
  guess = np.where(rng.random(num) < 0.8, category, rng.integers(0, 4, num))
  moved = np.where(rng.random(shape) < 0.15, np.roll(region, 1, 1), region)
  crowd = (region == 0) & (category[0] < 2)
  return (category[region], region), (guess[moved], moved), crowd


@pytest.mark.parametrize("rules", panoptic.RULES)
@pytest.mark.parametrize("seed", range(25))
def test_scores_are_those_of_pixel_sets(seed, rules):
  true, pred, crowd = random_maps(seed)
  if rules == "torchmetrics":
    crowd = np.zeros_like(crowd)
  _, scores = score(true, pred, crowd=crowd, rules=rules)
  expected = scores_by_sets(
    true,
    pred,
    crowd,
    num_classes=4,
    things={0, 1},
    forgiving=rules == "torchmetrics",
  )
  np.testing.assert_allclose(np.concatenate(scores), expected, rtol=1e-13)


def test_toy_by_hand():
  # Class 0: a 4 pixels against a 3 of them plus 1 of void: IoU 3/4; b missed.
  # Class 2: 3 pixels against 2 and 1 pixel too many: IoU 2/4, no match.
  true = row("0a 0a 0a 0a .. 0b 0b 2. 2. 2. 0b")
  pred = row("0x 0x 0x 1x 0x 1y 1y 2. 2. 1y 2.")
  out, scores = score(true, pred)
  np.testing.assert_array_equal(scores.tp, [[1, 0, 0, 0]])
  np.testing.assert_array_equal(scores.fp, [[0, 2, 1, 0]])
  np.testing.assert_array_equal(scores.fn, [[1, 0, 1, 0]])
  # Class 0: PQ = .75 / (1 + 1/2) = 1/2, SQ 3/4, RQ 2/3. Classes 1 and 2: 0.
  # Class 3 does not occur: three classes in the mean, two of them things.
  assert out["num_classes"] == 3
  assert out["pq"] == pytest.approx(0.5 / 3)
  assert out["sq"] == pytest.approx(0.75 / 3)
  assert out["rq"] == pytest.approx(2 / 9)
  assert out["pq_things"] == pytest.approx(0.25)
  assert out["pq_stuff"] == 0
  assert np.isnan(out["pq_per_class"][3])
  np.testing.assert_allclose(
    out["pq_per_class"][0], out["sq_per_class"][0] * out["rq_per_class"][0]
  )


def test_iou_of_exactly_one_half_is_no_match():
  # 2 of 4 pixels, nothing else: IoU 2/4. With one pixel more it matches.
  half, _ = score(row("0a 0a 0a 0a"), row("0x 0x .. .."))
  more, _ = score(row("0a 0a 0a 0a"), row("0x 0x 0x .."))
  assert half["pq"] == 0
  assert more["pq"] == pytest.approx(0.75)


def test_predicted_void_is_forgiven_only_by_torchmetrics():
  # |g| = 10, p covers 6 of them, the rest is predicted void.
  true, pred = row("0a " * 10), row("0x " * 6 + ".. " * 4)
  assert score(true, pred)[0]["pq"] == pytest.approx(0.6)
  assert score(true, pred, rules="torchmetrics")[0]["pq"] == 1.0
  # 4 of 10 covered, 6 predicted void: a false negative only to panopticapi.
  true, pred = row("0a " * 10), row("1x " * 4 + ".. " * 6)
  assert score(true, pred)[1].fn.sum() == 1
  assert score(true, pred, rules="torchmetrics")[1].fn.sum() == 0


def test_crowds_are_no_false_negatives_and_forgive_their_class():
  true = row("0a 0a 0b 0b 0b 2. 2.")
  crowd = np.array([[False] * 2 + [True] * 3 + [False] * 2])
  # x matches a; y lies on the crowd of its class, z of class 1 does too.
  pred = row("0x 0x 0y 0y 1z 2. 2.")
  out, scores = score(true, pred, crowd=crowd)
  np.testing.assert_array_equal(scores.fp, [[0, 1, 0, 0]])
  np.testing.assert_array_equal(scores.fn, [[0, 0, 0, 0]])
  assert out["pq_per_class"][0] == 1.0
  # Negative control: as an ordinary thing b is matched by y, at IoU 2/3.
  assert score(true, pred)[1].tp[0, 0] == 2
  with pytest.raises(UserError, match="know no crowd"):
    score(true, pred, crowd=crowd, rules="torchmetrics")


def test_edges():
  true = row("0a 0b 2. 2. 1a")
  assert score(true, true)[0]["pq"] == 1.0
  empty = row(".. .. .. .. ..")
  nothing, scores = score(true, empty)
  assert nothing["pq"] == nothing["sq"] == nothing["rq"] == 0
  assert scores.fn.sum() == 4
  # All-void truth: predictions lie on void only, no class counts.
  out, scores = score(empty, true)
  assert scores.fp.sum() == 0 and out["num_classes"] == 0
  assert np.isnan(out["pq"])
  scores = panoptic.panoptic_scores([], num_classes=4, things={0})
  assert np.isnan(panoptic.panoptic_quality(scores, things={0})["pq"])


def test_stuff_is_one_segment_whatever_its_instances():
  true, pred = row("2a 2a 2b 2b"), row("2x 2y 2z 2z")
  assert score(true, pred)[0]["pq"] == 1.0
  # Negative control: as things x and y are two halves, neither a match.
  as_things = score(row("0a 0a 0b 0b"), row("0x 0y 0z 0z"))
  assert as_things[0]["pq"] < 1.0


def test_order_ids_and_batching_do_not_matter():
  maps = [random_maps(seed) for seed in range(6)]
  options = {"num_classes": 4, "things": {0, 1}}

  def table(true, pred, crowd):
    return panoptic.segment_table(*true, *pred, crowd=crowd)

  tables = [table(*m) for m in maps]
  whole = panoptic.panoptic_scores(tables, **options)
  base = panoptic.panoptic_quality(whole, things={0, 1})
  parts = [
    panoptic.panoptic_scores(tables[a:b], **options)
    for a, b in ((4, 6), (0, 0), (1, 4), (0, 1))
  ]
  merged = panoptic.panoptic_quality(metrics.merge(parts), things={0, 1})
  np.testing.assert_equal(merged, base)
  renamed = [
    table((t[0], t[1] * -(10**14)), (p[0], 50 - p[1]), c) for t, p, c in maps
  ]
  again = panoptic.panoptic_scores(renamed, **options)
  np.testing.assert_array_equal(again.tp, whole.tp)
  np.testing.assert_allclose(again.iou, whole.iou, rtol=1e-14)


def test_mistakes_are_named():
  true = row("0a 1a 2.")
  with pytest.raises(UserError, match="category 2 is neither"):
    score(true, true, num_classes=2)
  with pytest.raises(UserError, match="void=3 is one of"):
    score(true, true, void=3)
  with pytest.raises(UserError, match="panopticapi"):
    score(true, true, rules="coco")
  with pytest.raises(UserError, match="one shape"):
    score(true, row("0a 0a"))


def load_coco(folder):
  """Category, instance and crowd maps of the two images, and the things."""
  info = json.loads((folder / "panoptic_examples.json").read_text())
  ids = sorted(c["id"] for c in info["categories"])
  things = {ids.index(c["id"]) for c in info["categories"] if c["isthing"] == 1}
  maps = []
  for annotation in info["annotations"]:
    path = folder / "panoptic_examples" / annotation["file_name"]
    rgb = np.array(Image.open(path)).astype(np.int64)
    instance = rgb @ np.array([1, 256, 65536])
    category = np.full(instance.shape, VOID)
    crowd = np.zeros(instance.shape, bool)
    for segment in annotation["segments_info"]:
      here = instance == segment["id"]
      category[here] = ids.index(segment["category_id"])
      crowd[here] = segment["iscrowd"] == 1
    maps.append((category, instance, crowd))
  return maps, things


def test_coco_samples(shared_data):
  maps, things = load_coco(shared_data / "coco_panoptic_sample")

  def quality(shift):
    tables = [
      panoptic.segment_table(
        c, i, np.roll(c, shift, 1), np.roll(i, shift, 1), crowd=crowd
      )
      for c, i, crowd in maps
    ]
    scores = panoptic.panoptic_scores(tables, num_classes=133, things=things)
    return panoptic.panoptic_quality(scores, things=things)

  perfect = quality(0)
  assert perfect["pq"] == perfect["pq_things"] == perfect["pq_stuff"] == 1.0
  assert perfect["num_classes"] == 8
  # From panopticapi's pq_compute_single_core on the truth rolled 3 columns.
  moved = quality(3)
  assert moved["pq"] == pytest.approx(0.7849785811319467, rel=1e-14)
  assert moved["sq"] == pytest.approx(0.8038684986668115, rel=1e-14)
  assert moved["rq"] == pytest.approx(0.9742132867132867, rel=1e-14)
  assert moved["pq_things"] == pytest.approx(0.6825281589494232, rel=1e-14)
  assert moved["pq_stuff"] == pytest.approx(0.8874290033144703, rel=1e-14)
