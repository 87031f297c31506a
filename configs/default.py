"""Every field there is, with its unit and source; other configs are deltas.

`[guide]` marks the published guide's name and value, `[here]` a field or
value of this project. Tuples are overridden as `--config.spectral.scales=8,16`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
  if variant:
    raise ValueError(f"configs/default.py has no variant {variant!r}")
  c = ConfigDict()
  c.seed = 0  # seeds initialisation, data order, augmentation and noise [here]

  c.model = model = ConfigDict()
  model.image_size = 128  # pixels, side of the square input and masks [guide]
  model.num_slots = 11  # K, background included [guide]
  model.slot_dim = 64  # D, channels of a slot [guide: 768 with ViT-B]
  model.num_iterations = 3  # T, refinement iterations [guide]
  model.use_spectral_init = True  # False: random tokens, or slot_init [guide]
  model.use_diffusion_decoder = True  # False: model.decoder [guide]
  model.dinov2_model = ""  # such as dinov2_vitb14; "" = model.encoder [guide]
  model.backbone_weights = ""  # file of launch/convert.py, or random [here]
  model.backbone_size = 0  # pixels, backbone input side; 0 = nearest multiple
  model.backbone_features = "tokens"  # tokens | keys, of the last block [here]
  model.backbone_trainable = 0  # last blocks that train; 0 = frozen [here]
  model.backbone_scan = False  # frozen blocks as one program: quick [here]
  model.encoder = "unet"  # unet | cnn | vit_tiny, when dinov2_model is ""
  model.width = 24  # channels of the encoder's finest level [here]
  # Pixels a side of one slot-attention token, or, with a backbone, which has
  # its own, of one token of the training-free colour step [here].
  model.token_stride = 4
  model.slot_init = "gaussian"  # gaussian | learned, without spectral or GMM
  model.slot_update = "ssm"  # ssm | gru, the slot update [guide: Mamba slots]
  model.decoder = "broadcast"  # broadcast | patch_mlp | none, without diffusion
  model.decoder_width = 32  # channels of the mixture decoder [here]
  model.stickiness = 0.05  # Lab / 100, of outlines moved to colour edges [here]
  model.mirror = True  # average the field with the mirror's at inference [here]
  model.compute_dtype = "float32"  # float32 | bfloat16, of large products

  c.spectral = spectral = ConfigDict()
  spectral.mode = "graph"  # graph | fused | per_scale [here]
  spectral.scales = (8, 16, 32)  # tokens a side, modes fused, per_scale [guide]
  spectral.k_per_scale = 4  # clusters a scale, mode per_scale [guide]
  spectral.knn_k = 20  # neighbours, modes fused and per_scale [guide]
  spectral.use_power_iteration = True  # False: dense eigh, unet only [guide]
  spectral.sigma = 0.06  # affinity scale of colours, Lab / 100 [here]
  spectral.vote_sigma = 0.22  # affinity scale of votes, image height / 8 [here]
  spectral.chroma_sigma = 0.15  # the same of chroma, Lab / 100; 0 = none [here]
  spectral.count_threshold = 0.85  # eigenvalues above it count objects [here]
  spectral.count = "auto"  # auto | threshold | eigengap | fixed [here]
  spectral.merge = 0.07  # smallest boundary contrast kept, Lab / 100 [here]

  c.mamba_slot = mamba = ConfigDict()
  mamba.d_state = 64  # S, SSM state width a head [guide]
  mamba.use_gmm_prior = True  # identifiable slots: MAP-EM + prior [guide]
  mamba.use_spatial_fusion = True  # token scan + dilated fusion [guide]
  mamba.weight_threshold = 0.0  # of 1/K: lighter slots go at inference [here]
  mamba.key_dim = 2  # E, width of the space in which slots compete [here]

  c.diffusion = diffusion = ConfigDict()
  diffusion.latent_dim = 256  # channels that are denoised [guide]
  diffusion.num_timesteps = 50  # training noise levels [guide]
  diffusion.num_inference_steps = 10  # sampler steps, never for masks [guide]
  diffusion.width = 64  # hidden width of the denoiser [here]
  diffusion.num_tokens = 64  # tokens of an image denoised a step; 0 = all
  diffusion.denoiser = "compositional"  # compositional | cross_attention

  c.loss_weights = weights = ConfigDict()
  weights.reconstruction = 1.0  # pixel error of the mixture decoder [here]
  weights.diffusion = 1.0  # denoising error [guide]
  weights.gmm_prior = 0.01  # KL of slots to one learned mixture [guide]
  weights.spectral_consistency = 0.1  # minus modularity of attention [guide]
  weights.diversity = 0.0  # hinge on slot cosine, against collapse [guide]
  weights.foreground = 1.0  # log loss of foreground on composites [here]
  weights.vote = 0.25  # error of votes for the object's centre [here]
  weights.slot = 0.05  # -log posterior of the own slot, an E-step [here]

  c.composite = composite = ConfigDict()
  composite.rounds = 3  # self-training rounds on composites; 0 = none [here]
  composite.pastes = 5  # most segments pasted into an image [here]
  composite.rate = 0.85  # share of images that are pasted into [here]
  composite.grey_object = 0.2  # chance that a segment turns grey [here]
  composite.trust = 0.4  # share of round 0 in which all labels count [here]

  c.training = training = ConfigDict()
  training.batch_size = 32  # images a step, over all devices [guide]
  training.num_epochs = 100  # passes over the training split [guide]
  training.num_steps = 0  # optimiser steps; 0 = from num_epochs [here]
  training.learning_rate = 4e-4  # peak, AdamW [guide]
  training.warmup_epochs = 5.0  # linear, then cosine; each round anew [guide]
  training.weight_decay = 0.01  # AdamW, matrices and kernels only [guide]
  training.grad_clip = 1.0  # global norm of the gradient [guide]
  training.gradient_accumulation = 1  # micro-batches a step [guide]
  # Computed again in the backward pass, to save memory: none | dots (all but
  # products with parameters) | full (all of a block) [here].
  training.remat = "none"
  training.max_skips = 0  # failed steps skipped before rolling back [here]
  training.max_rollbacks = 0  # to the last checkpoint, before giving up [here]
  training.max_loss_ratio = 1000.0  # of loss, gradient to median; 0 = off

  c.data = data = ConfigDict()
  data.dataset = "clevr_with_masks"  # a name launch/prepare.py knows [guide]
  data.data_root = "data"  # folder of prepared data sets [guide]
  data.train_split = "train[:90%]"  # TFDS split algebra [here]
  data.val_split = "train[90%:]"  # scored every val_interval epochs [here]
  data.extra_dataset = ""  # rendered set whose exact masks join in; "" = none
  data.extra_share = 0.3  # of the rows of a batch, if there is one [here]
  data.num_workers = 0  # grain worker processes; 0 = threads only [guide]
  data.num_threads = 8  # grain reader threads [here]
  data.max_pixels = 64_000_000  # pixels, larger image files are refused [here]
  data.cache = True  # keep decoded training images in memory [here]
  data.augmentation = True  # apply config.augment while training [guide]
  data.crop = (29, 221, 64, 256)  # pixels, rows and columns; () = whole [here]
  data.max_objects = 0  # drop scenes with more objects; 0 = keep all [here]

  c.augment = augment = ConfigDict()
  augment.flip = 0.5  # probability of a horizontal flip [here]
  augment.crop_scale = (1.0, 1.0)  # area share of a random resized crop [here]
  augment.brightness = 0.0  # +- share [here]
  augment.contrast = 0.0  # +- share [here]
  augment.saturation = 0.0  # +- share [here]
  augment.grayscale = 0.0  # probability [here]

  c.logging = logging = ConfigDict()
  logging.log_dir = ""  # TensorBoard events; "" = the workdir [guide]
  logging.log_interval = 10  # steps between lines of metrics.jsonl [guide]
  logging.val_interval = 10  # epochs between validations [guide]
  logging.save_interval = 50  # steps between checkpoints [guide]
  logging.image_interval = 50  # steps between pictures; 0 = none [guide]
  logging.keep_last = 3  # newest checkpoints kept [here]
  logging.keep_every = 0  # steps whose multiples are kept as well; 0 = none
  logging.keep_best = "val/ari"  # score whose best is kept; "" = none [here]
  logging.examples = False  # ids of every batch to examples-0.jsonl [here]

  c.mesh = mesh = ConfigDict()
  mesh.data = -1  # devices over which a batch is split; -1 = the rest [here]
  mesh.fsdp = 1  # devices over which state is split as well [here]
  mesh.model = 1  # devices over which widths are split [here]
  return c.lock()
