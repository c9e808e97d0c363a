"""Models of transformers: folders that rebuild themselves, and what its Trainer needs to know.

Read in this order:

    shiftwise_config    what ``config.json`` says of the layers
    notes               what a model's configuration says, and when
    quantizer           what transformers calls when it loads, saves and trains a converted model
    unasked             the same for models that were not converted, but have converted parts
    host                what the rest of the package calls
    checkpoints         the last whole checkpoint of a Trainer
    trainer             a Trainer that resumes from these, and decays what it decays in the original

This room imports transformers, so no other room may import it unasked. ``sw_transplant.convert`` imports it when the
model is one of transformers (:mod:`sw_transplant.surgery.hosts`). Import it yourself in a process that only loads:
before ``from_pretrained``, which asks for a registered ``quant_method``.
"""

from sw_transplant.hf.checkpoints import last_checkpoint
from sw_transplant.hf.host import attach
from sw_transplant.hf.quantizer import ShiftwiseQuantizer
from sw_transplant.hf.shiftwise_config import ShiftwiseConfig

__all__ = ["ShiftwiseConfig", "ShiftwiseQuantizer", "attach", "last_checkpoint"]
