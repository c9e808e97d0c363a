"""The module that may take the place of a site, built from what reading found there."""

from __future__ import annotations

from torch import Tensor, nn

from sw_transplant.find.keep import keep_attributes
from sw_transplant.find.match import Match, SourceBranch
from sw_transplant.find.parameters import reason_against_parameters
from sw_transplant.layers.branch import Branch
from sw_transplant.layers.parameters import take_over
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d


def build(site: nn.Module, match: Match, *, form: str) -> ShiftwiseConv2d:
    """The Shiftwise module for one match. Its tiles are copies; the BatchNorms are the site's own modules.

    Args:
        site: the module to replace; it is not changed.
        match: how the site is made.
        form: execution form.

    Raises:
        ValueError: the site is not made as the match says.
        NotImplementedError: a parameter has hooks that nothing else can have.
    """
    check_parameters(site, match)
    parameters = dict(site.named_parameters(remove_duplicate=False))
    weights = [_take(parameters, b.weight, _weight_shape(match, b), match) for b in match.branches if b.weight]
    branches = [_branch(site, match, source, parameters, like=weights[0]) for source in match.branches]
    if match.edges > 1:
        branches = [b if b.is_identity else b.with_edges(match.edges, seed=i) for i, b in enumerate(branches)]
    module = ShiftwiseConv2d(match.in_channels, match.out_channels, match.stride, branches, form=form, match=match)
    module.training = module.branches.training = site.training
    for branch in branches:
        branch.training = site.training  # and not .train(): a frozen BatchNorm stays in eval
    keep_attributes(module, site, match)
    return module


def check_parameters(site: nn.Module, match: Match, *, mode: str = "laid_out") -> None:
    """Refuses a site whose parameters nothing can take the place of.

    Raises:
        NotImplementedError: a parameter has hooks that nothing else can have, or is none.
    """
    used = {name for branch in match.branches for name in (branch.weight, branch.bias)}
    taken = {name: parameter for name, parameter in site.named_parameters() if name in used}
    if (reason := reason_against_parameters(taken, mode=mode, edges=match.edges)) is not None:
        raise NotImplementedError(f"{match.path or 'model'}: {reason}. Or leave it out with select=...")


def _branch(
    site: nn.Module, match: Match, source: SourceBranch, parameters: dict[str, nn.Parameter], *, like: Tensor
) -> Branch:
    bn = None
    if source.bn is not None:
        try:
            bn = site.get_submodule(source.bn)
        except AttributeError as error:
            raise ValueError(f"{match.path}: no BatchNorm {source.bn!r} in {type(site).__name__}") from error
    if source.weight is None:
        return Branch.identity(match.out_channels, source.tile, like, bn)
    weight = _take(parameters, source.weight, _weight_shape(match, source), match)
    bias = None if source.bias is None else _take(parameters, source.bias, (match.out_channels,), match)
    branch = Branch.from_kernel(source.geometry, weight, source.tile, bias=bias, bn=bn)
    take_over(branch.bank, weight, branch.layout)  # type: ignore[arg-type]
    if bias is not None and branch.bias is not None:
        take_over(branch.bias, bias)
    return branch


def _weight_shape(match: Match, source: SourceBranch) -> tuple[int, ...]:
    return (match.out_channels, 1, *source.geometry.kernel_size)


def _take(parameters: dict[str, nn.Parameter], name: str, shape: tuple[int, ...], match: Match) -> nn.Parameter:
    if name not in parameters:
        raise ValueError(
            f"{match.path}: no parameter {name!r} there, expected one of shape {shape}; is it another model?"
        )
    if tuple(parameters[name].shape) != shape:
        raise ValueError(
            f"{match.path}.{name}: shape {tuple(parameters[name].shape)}, expected {shape}; is it another model?"
        )
    return parameters[name]


def find_site(model: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        ValueError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"{path}: the model ({type(model).__name__}) has no such layer; is it another model?"
        ) from error
