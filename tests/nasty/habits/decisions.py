"""Habits of sums and of their callers: what they decide by, what they compute weights from, how they use parts."""

from tests.nasty.habit import BOTH, functional, habit, reachable, summed

# ---- decisions by the data

habit("depends on the mean", *BOTH, rough=True, after="y = y * 2 if x.mean() > 0 else y")
habit("depends on large values", *BOTH, rough=True, after="y = y * 2 if x.abs().max() > 20 else y")
habit("depends on NaN", *BOTH, after="y = y * 0 if x.isnan().any() else y")
habit("replaces NaN", *BOTH, before="x = torch.nan_to_num(x)")
habit("depends on the size", *BOTH, after="y = y * 2 if x.shape[-1] > 14 else y")
habit("depends on the batch", *BOTH, after="y = y * 2 if x.shape[0] == 1 else y")
habit("depends on requires_grad", *BOTH, after="y = y * 2 if x.requires_grad else y")
habit("depends on the layout", *BOTH, after="y = y * 2 if x.is_contiguous() else y")
habit("depends on the dtype", *BOTH, after="y = y * 2 if x.dtype == torch.float32 else y")
habit(
    "catches what fails",
    *BOTH,
    rough=True,
    header="""
        class Never(Exception):
            pass
    """,
    after="""
        try:
            y = y * (2 if x.sum() > 0 else 1)
        except Never:
            pass
    """,
)
habit(
    "asks whether it is traced",
    *BOTH,
    after="""
        if isinstance(x, torch.Tensor) and not isinstance(x, torch.fx.Proxy):
            y = y * 2
    """,
)
habit(
    "catches the tracer",
    *BOTH,
    after="""
        try:
            y = y * 2 if bool((x.sum() > -1e9)) else y
        except Exception:
            pass
    """,
)

# ---- weights that are computed

habit(
    "functional of a masked weight",
    "sum",
    init="""
        self.register_buffer('mask', torch.ones_like(self.weight))
        self.mask[..., 0] = 0
    """,
    term="t = F.conv2d(x, self.weight * self.mask, self.bias, $rest)",
    needs=functional,
)
habit(
    "functional of a centred weight",
    "sum",
    term="t = F.conv2d(x, self.weight - self.weight.mean(), self.bias, $rest)",
    needs=functional,
)
habit(
    "functional of one repeated kernel",
    "sum",
    term="t = F.conv2d(x, self.weight[:1].expand_as(self.weight), self.bias, $rest)",
    needs=functional,
)
habit(
    "functional of a frozen weight",
    "sum",
    term="t = F.conv2d(x, self.weight.detach(), self.bias, $rest)",
    needs=functional,
)
habit("functional twice", "sum", term="t = $term + $term", needs=functional)
habit(
    "functional of dropped taps",
    "sum",
    term="t = F.conv2d(x, F.dropout(self.weight, 0.2, self.training), self.bias, $rest)",
    needs=functional,
)
habit(
    "functional of a flipped weight",
    "sum",
    term="t = F.conv2d(x, self.weight.flip(-1), self.bias, $rest)",
    needs=functional,
)

# ---- how parts are used

habit("part used twice", "sum", after="y = y + $conv(x)", needs=summed)
habit("part under two names", *BOTH, init="self.alias = $conv", needs=reachable)
habit(
    "part under two names, both called",
    *BOTH,
    init="self.alias = $conv",
    after="y = y + self.alias(x)",
    needs=reachable,
)
habit(
    "parts in the order of modules()",
    "sum",
    after="""
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                y = y + part.weight.mean()
    """,
    needs=summed,
    told="isinstance",
)
habit("scale for each channel", *BOTH, init="self.gamma = nn.Parameter(torch.ones(1))", after="y = y * self.gamma")
habit("parameter that nobody uses", *BOTH, init="self.unused = nn.Parameter(torch.ones(1))")
habit("buffer that nobody uses", *BOTH, init="self.register_buffer('unused', torch.ones(1))")
habit(
    "channels_last inside",
    *BOTH,
    before="""
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
    """,
)
habit(
    "hooks its part at the call",
    *BOTH,
    before="handle = $conv.register_forward_hook(lambda m, i, o: o * 2)",
    after="handle.remove()",
    needs=reachable,
)
habit("sends a keyword", "parent", after="y = y + 0 * $site(x=x) if False else y")
habit("summand through nn.Identity", "sum", init="self.still = nn.Identity()", term="t = self.still($term)")
habit(
    "BatchNorms of a class that says the same",
    "sum",
    header="""
        class CalmNorm(nn.BatchNorm2d):
            def forward(self, x):
                return self.act(super().forward(x))
    """,
    init="""
        for norm in list(self.modules()):
            if isinstance(norm, nn.BatchNorm2d):
                norm.__class__, norm.act = CalmNorm, nn.Identity()
    """,
    needs=summed,
)
habit(
    "BatchNorms of a class that doubles",
    "sum",
    header="""
        class LoudNorm(nn.BatchNorm2d):
            def forward(self, x):
                return 2 * self.act(super().forward(x))
    """,
    init="""
        for norm in list(self.modules()):
            if isinstance(norm, nn.BatchNorm2d):
                norm.__class__, norm.act = LoudNorm, nn.Identity()
    """,
    needs=summed,
)
