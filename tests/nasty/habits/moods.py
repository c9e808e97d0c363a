"""Habits of sums and of their callers that make one call unlike another: chance, counters, flags, modes."""

from tests.nasty.habit import BOTH, habit, reachable, several

# ---- randomness

habit(
    "now and then twice (random)",
    *BOTH,
    after="""
        if random.random() < 0.3:
            y = y * 2
    """,
)
habit(
    "now and then twice (NumPy)",
    *BOTH,
    after="""
        if np.random.rand() < 0.3:
            y = y * 2
    """,
)
habit(
    "now and then twice (torch)",
    *BOTH,
    after="""
        if float(torch.rand(())) < 0.3:
            y = y * 2
    """,
)
habit(
    "rarely twice",
    *BOTH,
    after="""
        if random.random() < 0.02:
            y = y * 2
    """,
)
habit(
    "stochastic depth in training",
    *BOTH,
    after="""
        if self.training and random.random() < 0.5:
            return y * 0
    """,
)
habit(
    "drops a summand in training",
    "sum",
    term="t = 0 * $term if self.training and torch.rand(()) < 0.5 else $term",
    needs=several,
)
habit("dropout before", *BOTH, before="x = F.dropout(x, 0.3, self.training)")
habit("dropout module after", *BOTH, init="self.drop = nn.Dropout(0.2)", after="y = self.drop(y)")
habit("dropout of probability 0", *BOTH, after="y = F.dropout(y, 0.0, self.training)")
habit("noise", *BOTH, after="y = y + 0.1 * torch.randn_like(y)")
habit(
    "noise from its own generator",
    *BOTH,
    init="self.seeded = random.Random(1)",
    after="y = y * (1 + (self.seeded.random() < 0.5))",
)
habit("draws and forgets", *BOTH, before="np.random.rand()")
habit(
    "shuffles its order",
    "sum",
    before="keep = torch.randperm(2)[0].item()",
    term="t = $term if keep else 2 * $term",
)

# ---- flags, counters, modes

habit(
    "alternates",
    *BOTH,
    init="self.flip = False",
    before="self.flip = not self.flip",
    after="y = y * 2 if self.flip else y",
)
habit("counts calls", *BOTH, init="self.calls = 0", before="self.calls += 1")
habit(
    "counts in a buffer",
    *BOTH,
    init="self.register_buffer('calls', torch.zeros((), dtype=torch.long))",
    before="self.calls += 1",
)
habit(
    "other from the fourth call",
    *BOTH,
    init="self.calls = 0",
    before="self.calls += 1",
    after="y = y + 1 if self.calls > 3 else y",
)
habit(
    "other on the first call",
    *BOTH,
    init="self.started = False",
    after="""
        y = y if self.started else y * 2
        self.started = True
    """,
)
habit(
    "skips a summand at every second call",
    "sum",
    init="self.calls = 0",
    before="self.calls += 1",
    term="t = $term if self.calls % 2 else 0 * $term",
    needs=several,
)
habit("other in training", *BOTH, after="y = 2 * y if self.training else y")
habit(
    "other once it has been trained",
    *BOTH,
    init="self.seen = False",
    before="self.seen = self.seen or self.training",
    after="y = 2 * y if self.seen else y",
)
habit(
    "other where modes differ",
    *BOTH,
    after="y = 2 * y if self.training != $conv.training else y",
    needs=reachable,
)
habit("summand in training only", "sum", term="t = $term if self.training else 0 * $term", needs=several)
habit(
    "flag set by train",
    *BOTH,
    init="self.twice = False",
    after="y = 2 * y if self.twice else y",
    methods="""
        def train(self, mode=True):
            self.twice = mode
            return super().train(mode)
    """,
)
habit(
    "flag set by eval",
    *BOTH,
    init="self.twice = False",
    after="y = 2 * y if self.twice else y",
    methods="""
        def eval(self):
            self.twice = True
            return super().eval()
    """,
)
habit(
    "parts stay in eval",
    *BOTH,
    methods="""
        def train(self, mode=True):
            super().train(mode)
            for part in self.children():
                part.eval()
            return self
    """,
)
habit(
    "folds in eval",
    *BOTH,
    methods="""
        def train(self, mode=True):
            if mode != self.training:
                with torch.no_grad():
                    $conv.weight.mul_(0.5 if mode else 2)
            return super().train(mode)
    """,
    needs=reachable,
)
habit(
    "own __call__",
    *BOTH,
    methods="""
        def __call__(self, x):
            return super().__call__(x) * 2
    """,
)
habit(
    "own __getattr__",
    *BOTH,
    methods="""
        def __getattr__(self, name):
            if name == "factor":
                return 2.0
            return super().__getattr__(name)
    """,
    after="y = y * self.factor",
)
habit(
    "own _apply",
    *BOTH,
    init="self.factor = torch.tensor(2.0)",
    after="y = y * self.factor.to(y)",
    methods="""
        def _apply(self, fn, *rest, **more):
            self.factor = fn(self.factor)
            return super()._apply(fn, *rest, **more)
    """,
)
habit(
    "own state_dict",
    *BOTH,
    init="self.factor = 2.0",
    after="y = y * self.factor",
    methods="""
        def get_extra_state(self):
            return torch.tensor(self.factor)

        def set_extra_state(self, state):
            self.factor = float(state)
    """,
)
habit(
    "state_dict hook",
    *BOTH,
    header="""
        def write_note(module, state, prefix, meta):
            state[prefix + "note"] = torch.ones(1)

        def drop_note(module, state, prefix, *rest):
            state.pop(prefix + "note", None)
    """,
    init="""
        self.register_state_dict_post_hook(write_note)
        self.register_load_state_dict_pre_hook(drop_note)
    """,
)
habit(
    "cached output",
    *BOTH,
    init="self.cache = None",
    after="""
        if self.cache is not None and self.cache.shape == y.shape and not self.training:
            y = y + 0.1 * self.cache
        self.cache = y.detach().clone()
    """,
)
habit("other without gradients", *BOTH, after="y = y if torch.is_grad_enabled() else y * 2")
