"""Forward passes that wait: one pass is enough, however many layers there are.

Layer after layer is fitted on all images, and the network behind it has to wait. Running it again from its start for
every layer takes as many passes as there are layers. Here each run has a thread that stops where a layer is called, and
goes on with the module that took its place. One thread computes at a time, so nothing depends on chance. What waits in
memory are the maps between two layers, of all images: where they would take too much, nothing waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.surgery.calibration.images import Images, Run
from sw_transplant.surgery.calibration.responses import Visit, quiet

_NUMBERS = 2**29
"""That may wait: 2 GB in float32."""

_MAPS = 5
"""Of the size of a layer's input, that a run of both networks keeps while it waits: inputs, targets, shortcuts."""


class _AbandonedError(BaseException):
    """The run is not wanted any more."""


class _Waiting:
    """One run in a thread of its own."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.at: str | None = None
        self.tensor: Tensor | None = None
        self.error: BaseException | None = None
        self.ended = self._abandoned = False
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._live, args=(body,), daemon=True)
        self._started = False

    def _live(self, body: Callable[[], Any]) -> None:
        try:
            body()
        except _AbandonedError:
            pass
        except BaseException as error:
            self.error = error
        self.at, self.tensor, self.ended = None, None, True
        self._there.release()

    def stop_at(self, key: str, tensor: Tensor) -> None:
        """Called by the run itself: waits until it is told to go on."""
        self.at, self.tensor = key, tensor
        self._there.release()
        self._go.acquire()
        if self._abandoned:
            raise _AbandonedError

    def go_on(self) -> None:
        """Lets it run to where it stops next, or to its end; raises what it raised."""
        if self.ended:
            return
        if self._started:
            self._go.release()
        else:
            self._started = True
            self.thread.start()
        self._there.acquire()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Ends it."""
        self._abandoned = True
        if self._started and not self.ended:
            self._go.release()
            self.thread.join()


class PausedRuns:
    """Runs of a model that stop at some of its modules.

    Args:
        model: in eval mode for as long as this is in use.
        runs: calls of it.
        sites: modules of it, by a key.
        outputs: True: stop with a site's output. False: stop with its input, to go on with what :meth:`finish` names.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run], sites: Mapping[str, nn.Module], *, outputs: bool) -> None:
        self._done: dict[str, nn.Module | None] = {}
        self._waiting = [_Waiting(self._in_thread(model, run)) for run in runs]
        self._undo: dict[str, Callable[[], Any]] = {}
        for key, site in sites.items():
            if outputs:
                self._undo[key] = site.register_forward_hook(self._after(key)).remove
            else:
                site.__dict__["forward"] = self._in_place_of(key)
                self._undo[key] = partial(site.__dict__.pop, "forward", None)

    def __len__(self) -> int:
        return len(self._waiting)

    def tensor(self, number: int, key: str) -> Tensor | None:
        """What a run has where it stops at a site; None where it does not come there now."""
        waiting = self._waiting[number]
        if waiting.at is None or waiting.at in self._done:
            waiting.go_on()
        return waiting.tensor if waiting.at == key else None

    def free(self, key: str) -> None:
        """Leaves a site as it was; runs that stop there wait on."""
        self._undo.pop(key)()

    def finish(self, key: str, module: nn.Module | None = None) -> None:
        """No run stops at this site any more; what waits there goes on with the module."""
        self._done[key] = module

    def close(self) -> None:
        """Ends all runs, and leaves the model as it was."""
        for waiting in self._waiting:
            waiting.abandon()
        for undo in self._undo.values():
            undo()
        self._undo.clear()

    def _in_thread(self, model: nn.Module, run: Run) -> Callable[[], Any]:
        """What a thread does. Modes of the caller that belong to a thread are taken along."""
        parameters = list(model.parameters())
        device = parameters[0].device if parameters else torch.device("cpu")
        autocast, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

        def body() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=autocast):
                run(model)

        return body

    def _here(self) -> _Waiting:
        mine = threading.current_thread()
        return next(waiting for waiting in self._waiting if waiting.thread is mine)

    def _after(self, key: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if key not in self._done:
                self._here().stop_at(key, output.detach().clone())

        return hook

    def _in_place_of(self, key: str) -> Callable[[Tensor], Any]:
        def forward(x: Tensor) -> Any:
            if key not in self._done:
                self._here().stop_at(key, x)
            module = self._done[key]
            assert module is not None
            return module(x)

        return forward


class SideBySide:
    """Runs of the original and of the network converted so far, all waiting at the same layer."""

    def __init__(self, original: nn.Module, theirs: PausedRuns, mine: PausedRuns) -> None:
        self._original, self._theirs, self._mine = original, theirs, mine

    def collect(self, target: nn.Module, path: str, into: Sequence[Any]) -> None:
        """Adds to what is summed what a layer gets in the converted network, and what the original's gave.

        Args:
            target: the network converted so far.
            path: of the layer.
            into: objects with ``add(x, y)``.
        """
        with quiet(self._original), quiet(target):
            for number in range(len(self._mine)):
                y, x = self._theirs.tensor(number, path), self._mine.tensor(number, path)
                if (x is None) != (y is None):
                    raise ValueError(
                        f"{path or 'model'}: a batch comes to this layer in one of the original and the converted "
                        "network only; calibrate on images that take the same way through both, or leave the layer out "
                        "with select=..."
                    )
                for each in into if x is not None else ():
                    each.add(x, y)
        self._theirs.finish(path)
        self._mine.free(path)

    def placed(self, path: str, module: nn.Module) -> None:
        """Tells what took the place of the layer."""
        self._mine.finish(path, module)


@contextmanager
def side_by_side(
    original: nn.Module, target: nn.Module, images: Images, paths: Sequence[str], visited: Mapping[str, Visit]
) -> Iterator[SideBySide | None]:
    """Both networks on all images, ready to be stopped at layers; None where they would take too much memory to wait.

    Args:
        original, target: the networks.
        images: what they run on.
        paths: of the layers, in the order of execution.
        visited: how these were run: once each.
    """
    largest = max(visited[path].inputs[0][1:].numel() for path in paths)
    runs, waiting = [], 0
    for run in images.runs() if not images.is_function else ():
        runs.append(run)
        waiting += _MAPS * largest * _images_in(run)
        if waiting > _NUMBERS:
            break
    if not runs or waiting > _NUMBERS:
        yield None
        return
    theirs = PausedRuns(original, runs, {path: original.get_submodule(path) for path in paths}, outputs=True)
    mine = PausedRuns(target, runs, {path: target.get_submodule(path) for path in paths}, outputs=False)
    try:
        yield SideBySide(original, theirs, mine)
    finally:
        theirs.close()
        mine.close()


def _images_in(run: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(run.batch if not isinstance(run.batch, Mapping) else dict(run.batch))
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
