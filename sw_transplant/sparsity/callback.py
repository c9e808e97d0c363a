"""Filter sparsity under the Trainer of Hugging Face transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sw_transplant.sparsity.filter_sparsity import FilterSparsity

if TYPE_CHECKING:
    from transformers import TrainerCallback


def sparsity_callback(sparsity: FilterSparsity) -> TrainerCallback:
    """For Hugging Face's ``Trainer(..., callbacks=[sparsity_callback(sparsity)])``; also where a run is resumed.

    Call ``sparsity.initialise(...)`` before ``trainer.train()``. Without ``total_steps`` the rate falls to zero over
    the steps of the training.
    """
    from transformers import TrainerCallback

    class SparsityCallback(TrainerCallback):
        """Attaches to the optimizer for as long as the training runs."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if sparsity.total_steps is None:
                sparsity.total_steps = state.max_steps
            sparsity.attach(kwargs["optimizer"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sparsity.detach()

    return SparsityCallback()
