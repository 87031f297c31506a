"""Sheets of any pictures, panels, slot PCA and PNG files."""

import numpy as np
import pytest
from PIL import Image

from spectraldiffusion_jax import colours, sheet, visualise
from spectraldiffusion_jax.errors import UserError


def checkers(height, width):
  rows, columns = np.mgrid[:height, :width]
  return np.stack([(rows + columns) % 2 * 255] * 3, -1).astype(np.uint8)


def find(picture, part):
  """Whether `part` occurs in `picture`, pixel for pixel."""
  height, width = part.shape[:2]
  for top in range(len(picture) - height + 1):
    at = picture[top].tobytes().find(part[0].tobytes())
    left = -(-at // 3)
    block = picture[top : top + height, left : left + width]
    if at >= 0 and np.array_equal(block, part):
      return True
  return False


@pytest.mark.parametrize(
  ("size", "expected"),
  [
    ((64, 64), (128, 128)),  # twice
    ((48, 48), (128, 128)),  # 8/3 times
    ((300, 200), (128, 85)),  # smaller, upright
    ((100, 1000), (26, 256)),  # limited by its width
    ((1, 5000), (1, 256)),
  ],
)
def test_fit_keeps_the_aspect(size, expected):
  out = sheet.fit(np.zeros((*size, 3), np.uint8), height=128, max_width=256)
  assert out.shape == (*expected, 3)


def test_small_pictures_are_enlarged_pixel_by_pixel():
  out = sheet.fit(checkers(4, 5), height=12, max_width=99)
  np.testing.assert_array_equal(out, checkers(4, 5).repeat(3, 0).repeat(3, 1))


def test_contact_sheet_shows_every_picture():
  red = np.full((16, 24, 3), (255, 0, 0), np.uint8)
  green = red[..., [1, 0, 2]]
  tall = np.full((40, 10), 77, np.uint8)
  out = sheet.contact_sheet(
    [[red, None], [green, tall, red]], captions=["one", "two"], height=32
  )
  assert out.dtype == np.uint8
  for picture in (red, green, tall):
    assert find(out, sheet.fit(picture, height=32, max_width=64))
  # Two columns side by side are wider and less tall.
  wide = sheet.contact_sheet([[red], [green]], height=32, columns=2)
  high = sheet.contact_sheet([[red], [green]], height=32)
  assert wide.shape[1] > high.shape[1] and wide.shape[0] < high.shape[0]
  with pytest.raises(UserError, match="at least one row"):
    sheet.contact_sheet([])


def test_captions_are_drawn_and_never_widen_the_sheet():
  picture = np.zeros((32, 32, 3), np.uint8)
  plain = sheet.contact_sheet([[picture]], captions=[""], height=32)
  short = sheet.contact_sheet([[picture]], captions=["ARI"], height=32)
  long = sheet.contact_sheet([[picture]], captions=["x" * 500], height=32)
  assert plain.shape == short.shape == long.shape
  assert (plain != short).any() and (short != long).any()


def scene(size=(32, 48), slots=5, batch=3):
  rng = np.random.default_rng(0)
  truth = np.zeros((batch, *size), np.int32)
  truth[:, 4:12, 4:20], truth[:, 16:28, 24:40] = 1, 2
  pred = np.array([3, 0, 4])[truth]
  attention = np.eye(slots)[pred].transpose(0, 3, 1, 2)[:, :, ::4, ::4]
  return rng.random((batch, *size, 3)), truth, pred, attention


def test_equal_colours_mean_agreement():
  _, truth, pred, _ = scene()
  names = visualise.matching_names(truth[0], pred[0])
  assert names == {3: 0, 0: 1, 4: 2}
  # One segment too many: it gets a label, and colour, of its own.
  pred[0, 5, 5:8] = 1
  assert visualise.matching_names(truth[0], pred[0]) == names | {1: 3}


def test_panels_hold_all_parts():
  image, truth, pred, attention = scene()
  plain = visualise.panels(image, pred, height=64)
  assert find(plain, sheet.fit(image[0], height=64, max_width=128))
  assert find(
    plain, sheet.fit(colours.colour_masks(pred[0]), height=64, max_width=128)
  )
  full = visualise.panels(
    image,
    pred,
    truth=truth,
    reconstruction=image * 0.5,
    attention=attention,
    captions=["FG-ARI 1.00"] * 3,
    height=64,
    limit=2,
  )
  masks = sheet.fit(colours.colour_masks(truth[0]), height=64, max_width=128)
  assert find(full, masks)
  # Predicted masks are shown in the truth's colours: the same part twice.
  first = np.argwhere((full == masks[0, 0]).all(-1))
  assert len(first) > 2 * (truth[0] == 0).sum()
  strip = visualise.attention_strip(
    attention[0], names={3: 0, 0: 1, 4: 2}, height=64
  )
  assert find(full, strip) and strip.shape[0] <= 64
  assert full.shape[1] > plain.shape[1]


@pytest.mark.parametrize("slots", [1, 2, 7, 24])
def test_attention_strip_of_any_number_of_slots(slots):
  attention = np.full((slots, 8, 16), 1 / slots, np.float32)
  out = visualise.attention_strip(attention, names={0: 1}, height=96)
  assert out.shape[0] <= 96
  assert (out[0, 0] == colours.label_colours(2)[1]).all()


def test_panels_take_images_of_any_size():
  sizes = [(20, 90), (200, 31), (64, 64)]
  images = [np.zeros((*size, 3), np.uint8) for size in sizes]
  labels = [np.arange(h * w).reshape(h, w) % 3 for h, w in sizes]
  out = visualise.panels(images, labels, columns=2, captions=list("abc"))
  assert out.ndim == 3 and out.dtype == np.uint8


def test_slot_pca_marks_every_slot():
  rng = np.random.default_rng(0)
  slots = rng.normal(size=(4, 3, 8)) * 0.01
  slots[..., 0] += np.array([-5.0, 0.0, 5.0])
  out = visualise.slot_pca(slots, size=200)
  assert out.shape == (200, 200, 3)
  seen = {
    slot: np.argwhere((out == colour).all(-1)).mean(0)
    for slot, colour in enumerate(colours.label_colours(3))
  }
  # The first axis is the one that tells the slots apart: 0, 1, 2 from left
  # to right or from right to left.
  x = [seen[slot][1] for slot in range(3)]
  assert sorted(x) in (x, x[::-1]) and max(x) - min(x) > 100
  active = np.ones((4, 3), bool)
  active[:, 2] = False
  hidden = visualise.slot_pca(slots, active, size=200)
  assert not (hidden == colours.label_colours(3)[2]).all(-1).any()


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 3, 1), (0, 3, 4)])
def test_slot_pca_of_degenerate_slots(shape):
  assert visualise.slot_pca(np.zeros(shape), size=90).shape == (90, 90, 3)


def test_png_files(tmp_path):
  picture = checkers(5, 7)
  visualise.write_png(tmp_path / "a" / "b.png", picture)
  read = np.asarray(Image.open(tmp_path / "a" / "b.png"))
  np.testing.assert_array_equal(read, picture)
  assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.png"]


@pytest.mark.parametrize(
  ("top", "mode"), [(1, "P"), (255, "P"), (256, "I;16"), (65535, "I;16")]
)
def test_label_files_keep_every_id(tmp_path, top, mode):
  labels = np.linspace(0, top, 35).astype(np.int64).reshape(5, 7)
  visualise.write_labels(tmp_path / "labels.png", labels)
  image = Image.open(tmp_path / "labels.png")
  assert image.mode == mode
  np.testing.assert_array_equal(np.asarray(image), labels)
  if mode == "P":
    shown = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown, colours.colour_masks(labels))


@pytest.mark.parametrize("bad", [-1, 65536])
def test_labels_that_are_no_png_are_refused(tmp_path, bad):
  with pytest.raises(UserError, match="renumber"):
    visualise.write_labels(tmp_path / "x.png", np.array([[0, bad]]))
  assert not list(tmp_path.iterdir())
