"""Habits of parameters, before a conversion: hooks, parametrizations, what is trained and what is not."""

from tests.nasty.habit import biased, habit, reachable

# ---- hooks

habit(
    "forward hook on the convolution",
    "built",
    statements="conv.register_forward_hook(twice)",
    header="""
        def twice(m, i, o):
            return o * 2
    """,
    needs=reachable,
)
habit(
    "forward pre-hook on the convolution",
    "built",
    statements="conv.register_forward_pre_hook(halved)",
    header="""
        def halved(m, i):
            return (i[0] * 0.5,)
    """,
    needs=reachable,
)
habit(
    "forward hook on the site",
    "built",
    statements="site.register_forward_hook(twice)",
    header="""
        def twice(m, i, o):
            return o * 2
    """,
)
habit(
    "forward hook on the parent",
    "built",
    statements="block.register_forward_hook(twice)",
    header="""
        def twice(m, i, o):
            return o * 2
    """,
)
habit(
    "hook that keeps outputs",
    "built",
    statements="site.register_forward_hook(keep)",
    header="""
        def keep(m, i, o):
            m.kept = o.detach()
    """,
)
habit(
    "backward hook on the convolution",
    "built",
    statements="conv.register_full_backward_hook(louder)",
    header="""
        def louder(m, gi, go):
            return (gi[0] * 2,)
    """,
    needs=reachable,
)
habit(
    "backward hook on the site",
    "built",
    statements="site.register_full_backward_hook(louder)",
    header="""
        def louder(m, gi, go):
            return (gi[0] * 2,)
    """,
)
habit(
    "backward pre-hook on the site",
    "built",
    statements="site.register_full_backward_pre_hook(louder_still)",
    header="""
        def louder_still(m, go):
            return (go[0] * 2,)
    """,
)
habit(
    "tensor hook on the weight",
    "built",
    statements="conv.weight.register_hook(doubled)",
    header="""
        def doubled(g):
            return g * 2
    """,
)
habit(
    "tensor hook on the bias",
    "built",
    statements="conv.bias.register_hook(doubled)",
    header="""
        def doubled(g):
            return g * 2
    """,
    needs=biased,
)
habit(
    "tensor hook that masks",
    "built",
    statements="conv.weight.register_hook(centred)",
    header="""
        def centred(g):
            g = g.clone()
            g[..., 0] = 0
            return g
    """,
)
habit(
    "hook after accumulation",
    "built",
    statements="conv.weight.register_post_accumulate_grad_hook(descend)",
    header="""
        def descend(p):
            p.grad.mul_(0.5)
    """,
)
habit(
    "tensor hook on a BatchNorm",
    "built",
    statements="""
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.weight is not None:
                norm.weight.register_hook(doubled)
    """,
    header="""
        def doubled(g):
            return g * 2
    """,
)
habit(
    "state_dict hook on the convolution",
    "built",
    statements="conv.register_state_dict_post_hook(noting)",
    header="""
        def noting(m, state, prefix, meta):
            state[prefix + 'weight'] = state[prefix + 'weight'] * 2
    """,
    needs=reachable,
)

# ---- parametrizations

habit(
    "parametrized",
    "built",
    header="""
        class Half(nn.Module):
            def forward(self, w):
                return w * 0.5
    """,
    statements="nn.utils.parametrize.register_parametrization(conv, 'weight', Half())",
    needs=reachable,
)
habit("weight_norm", "built", statements="nn.utils.parametrizations.weight_norm(conv)", needs=reachable)
habit("weight_norm, old", "built", statements="nn.utils.weight_norm(conv)", needs=reachable)
habit("spectral_norm", "built", statements="nn.utils.parametrizations.spectral_norm(conv)", needs=reachable)
habit("spectral_norm, old", "built", statements="nn.utils.spectral_norm(conv)", needs=reachable)
habit(
    "pruned",
    "built",
    header="from torch.nn.utils import prune",
    statements="prune.l1_unstructured(conv, 'weight', 0.3)",
    needs=reachable,
)
habit(
    "pruned for good",
    "built",
    header="from torch.nn.utils import prune",
    statements="""
        prune.l1_unstructured(conv, 'weight', 0.3)
        prune.remove(conv, 'weight')
    """,
    needs=reachable,
)
habit(
    "weight is a buffer",
    "built",
    statements="""
        w = conv.weight.detach().clone()
        del conv.weight
        conv.register_buffer('weight', w)
    """,
)
habit(
    "weight is a plain tensor",
    "built",
    statements="""
        w = conv.weight.detach().clone()
        del conv.weight
        conv.weight = w
    """,
)
habit(
    "bias is a buffer",
    "built",
    statements="""
        w = conv.bias.detach().clone()
        del conv.bias
        conv.register_buffer('bias', w)
    """,
    needs=biased,
)
habit(
    "weight is a computed tensor",
    "built",
    statements="""
        w = conv.weight
        del conv.weight
        conv.raw = w
        conv.weight = w * 0.5
    """,
    needs=reachable,
)
habit("weight initialised", "built", statements="nn.init.constant_(conv.weight, 0.05)")
habit(
    "weight is a view",
    "built",
    statements="""
        store = torch.randn(3, *conv.weight.shape).to(conv.weight)
        conv.weight = nn.Parameter(store[1])
    """,
)
habit(
    "weight is not contiguous",
    "built",
    statements="conv.weight = nn.Parameter(conv.weight.detach().transpose(2, 3).contiguous().transpose(2, 3))",
)
habit(
    "weight of a subclass of Parameter",
    "built",
    header="""
        class Own(nn.Parameter):
            pass
    """,
    statements="conv.weight = Own(conv.weight.detach().clone())",
)
habit("weight with a grad already", "built", statements="conv.weight.grad = torch.ones_like(conv.weight)")

# ---- what is trained

habit("weight frozen", "built", statements="conv.weight.requires_grad_(False)")
habit("bias frozen", "built", statements="conv.bias.requires_grad_(False)", needs=biased)
habit(
    "all frozen but the bias",
    "built",
    statements="""
        net.requires_grad_(False)
        conv.bias.requires_grad_(True)
    """,
    needs=biased,
)
habit("all frozen", "built", statements="block.requires_grad_(False)")
habit("weight without decay", "built", statements="conv.weight._no_weight_decay = True")
habit("bias without decay", "built", statements="conv.bias._no_weight_decay = True", needs=biased)
habit("weight with its own learning rate", "built", statements="conv.weight.rate = 0.5")
habit(
    "BatchNorms frozen in eval",
    "built",
    statements="""
        [bn.eval() for bn in block.modules() if isinstance(bn, nn.BatchNorm2d)]
        block.train = types.MethodType(bystander, block)
    """,
    header="""
        def bystander(self, mode=True):
            self.training = mode
            return self
    """,
)
