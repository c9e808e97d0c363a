"""Statements that users run on models, converted or not."""

from tests.nasty.habit import biased, habit, reachable, resizable

# ---- statements that users run on models, converted or not

habit("initialised anew", "later", statements="nn.init.constant_(conv.weight, 0.05)", needs=reachable)
habit(
    "initialised anew by apply",
    "later",
    header="""
        def anew(m):
            if hasattr(m, 'kernel_size'):
                nn.init.constant_(m.weight, 0.05)
    """,
    statements="net.apply(anew)",
    needs=reachable,
)
habit("weights clamped", "later", statements="conv.weight.data.clamp_(-0.05, 0.05)", needs=reachable)
habit(
    "weights multiplied",
    "later",
    statements="""
        with torch.no_grad():
            conv.weight.mul_(0.5)
    """,
    needs=reachable,
)
habit(
    "weights copied",
    "later",
    statements="""
        with torch.no_grad():
            conv.weight.copy_(conv.weight.flip(-1))
    """,
    needs=reachable,
)
habit("weights set", "later", statements="conv.weight = nn.Parameter(conv.weight.detach() * 0.5)", needs=reachable)
habit("weights assigned as data", "later", statements="conv.weight.data = conv.weight.data * 0.5", needs=reachable)
habit(
    "bias multiplied",
    "later",
    statements="""
        with torch.no_grad():
            conv.bias.mul_(0.5)
    """,
    needs=lambda block: reachable(block) and biased(block),
)
habit("weight frozen later", "later", statements="conv.weight.requires_grad_(False)", needs=reachable)
habit(
    "weight hooked later",
    "later",
    header="""
        def doubled(g):
            return g * 2
    """,
    statements="conv.weight.register_hook(doubled)",
    needs=reachable,
)
habit(
    "pruned later",
    "later",
    header="from torch.nn.utils import prune",
    statements="prune.l1_unstructured(conv, 'weight', 0.3)",
    needs=reachable,
)
habit(
    "parametrized later",
    "later",
    header="""
        class Half(nn.Module):
            def forward(self, w):
                return w * 0.5
    """,
    statements="nn.utils.parametrize.register_parametrization(conv, 'weight', Half())",
    needs=reachable,
)
habit(
    "hooked later",
    "later",
    header="""
        def twice(m, i, o):
            return o * 2
    """,
    statements="conv.register_forward_hook(twice)",
    needs=reachable,
)
habit(
    "padding set later",
    "later",
    statements="conv.padding = (0, 0)",
    needs=resizable,
)
