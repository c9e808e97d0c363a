"""Habits of instances, before a conversion: what differs from their class, and what is shared."""

from tests.nasty.habit import biased, habit, reachable, resizable

# ---- instances that differ from their class

habit(
    "forward replaced on the convolution",
    "built",
    statements="conv.forward = functools.partial(twofold, conv)",
    header="""
        def twofold(self, x):
            return 2 * type(self).forward(self, x)
    """,
    needs=reachable,
)
habit(
    "forward replaced on the site",
    "built",
    statements="site.forward = functools.partial(twofold, site)",
    header="""
        def twofold(self, x):
            return 2 * type(self).forward(self, x)
    """,
)
habit(
    "root forward bound anew",
    "built",
    statements="net.forward = types.MethodType(doubled_root, net)",
    header="""
        def doubled_root(self, x):
            return 2 * type(self).forward(self, x)
    """,
)
habit(
    "root forward is a closure",
    "built",
    statements="""
        old = net.forward
        net.forward = lambda x: 2 * old(x)
    """,
)
habit(
    "root forward closes over the parts",
    "built",
    statements="""
        blocks = net.blocks
        def through(x):
            for one in blocks:
                x = one(x)
            return x
        net.forward = through
    """,
)
habit(
    "parent's forward is a closure",
    "built",
    statements="""
        calls = block.forward
        block.forward = lambda x: 2 * calls(x)
    """,
)
habit(
    "flag set on the instance",
    "built",
    statements="""
        conv.loud = True
        site.factor = 2.0
        block.factor = 2.0
    """,
)
habit(
    "class changed",
    "built",
    header="""
        class Loud(nn.Conv2d):
            def forward(self, x):
                return 2 * super().forward(x)
    """,
    statements="conv.__class__ = Loud",
    needs=lambda block: reachable(block) and block.plain,
)
habit(
    "padding changed after the fact",
    "built",
    statements="conv.padding = (0, 0)",
    needs=resizable,
)
habit(
    "padding_mode changed after the fact",
    "built",
    statements="conv.padding_mode = 'circular'",
    needs=lambda block: reachable(block) and block.plain,
)
habit(
    "deep-copied",
    "built",
    statements="""
        import copy
        net = copy.deepcopy(net)
    """,
)
habit("pickled", "built", statements="net = pickle.loads(pickle.dumps(net))")
habit("site in eval, the rest in train", "built", statements="site.eval()")
habit(
    "convolution in train, the rest in eval",
    "built",
    statements="""
        net.eval()
        conv.train()
    """,
    needs=reachable,
)

# ---- shared

habit("convolution shared by two blocks", "built", statements="net.blocks[-1].extra = conv", needs=reachable)
habit(
    "site shared by two blocks",
    "built",
    statements="net.blocks.append(block)",
    needs=lambda block: block.keeps_shape,
)
habit(
    "weight tied to another",
    "built",
    statements="""
        net.twin = nn.Conv2d(1, 1, 1)
        net.twin.weight = conv.weight
    """,
)
habit(
    "weight tied to all of its shape",
    "built",
    statements="""
        for other in net.modules():
            if isinstance(other, nn.Conv2d) and other.weight.shape == conv.weight.shape:
                other.weight = conv.weight
    """,
)
habit(
    "bias tied to a BatchNorm's",
    "built",
    statements="""
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.bias is not None and norm.bias.shape == conv.bias.shape:
                norm.bias = conv.bias
    """,
    needs=biased,
)
habit(
    "BatchNorm shared",
    "built",
    statements="""
        norms = [bn for bn in block.modules() if isinstance(bn, nn.BatchNorm2d)]
        if norms:
            net.again = norms[0]
    """,
)
