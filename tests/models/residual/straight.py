"""The depth mixers once more: a decoder of straight-line NumPy, layer after layer, with no scan, buffer, mask or cache,
written from the papers' formulas. It shares no line with the models that it is compared with."""

import math

import numpy as np

EPSILON = 1e-6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def rms(x, epsilon=EPSILON):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


class Decoder:
    """Pre-norm layers of a `ModelConfig` without positions, with as many key/value heads as heads."""

    def __init__(self, cfg, params):
        self.cfg, self.params = cfg, params
        self.layers, self.L = params["layers"], cfg.layers
        self.head = params["head"].get("residual", {})

    def own(self, i):
        """Layer i's mixer parameters."""
        pick = lambda tree: {k: pick(v) if isinstance(v, dict) else v[i] for k, v in tree.items()}
        return pick(self.layers.get("residual", {}))

    def attention(self, i, q, k=None, v=None, gains=(None, None)):
        p = self.layers["attention"]
        gain = p["norm"]["scale"][i]
        q, k, v = (
            rms(x, self.cfg.norm.epsilon) * (gain if g is None else g)
            for x, g in zip((q, q if k is None else k, q if v is None else v), (None, *gains), strict=True)
        )
        q, k, v = (
            np.einsum("btd,dhk->bhtk", x, p[n]["kernel"][i])
            for x, n in zip((q, k, v), ("query", "key", "value"), strict=True)
        )
        s = np.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(q.shape[-1])
        s = np.where(np.tril(np.ones(s.shape[-2:], bool)), s, -np.inf)
        return np.einsum("bhts,bhsk,hkd->btd", softmax(s, axis=-1), v, p["out"]["kernel"][i])

    def feedforward(self, i, x):
        p = self.layers["feedforward"]
        x = rms(x, self.cfg.norm.epsilon) * p["norm"]["scale"][i]
        return (silu(x @ p["gate"]["kernel"][i]) * (x @ p["up"]["kernel"][i])) @ p["down"]["kernel"][i]

    def branch(self, s, h):
        return self.feedforward(s // 2, h) if s % 2 else self.attention(s // 2, h)

    def logits(self, tokens):
        self.first = self.params["embedding"].get("residual", {})
        table = self.params["embedding"]["tokens"]
        h = MIXERS[type(self.cfg.residual).__name__](self, self.cfg.residual, table[tokens])
        h = rms(h, self.cfg.norm.epsilon) * self.params["head"]["norm"]["scale"]
        return h @ table.T


def plain(m, _, x):
    for s in range(2 * m.L):
        x = x + m.branch(s, x)
    return x


def dense_former(m, r, x):
    X, y = [x], x
    for i in range(1, m.L + 1):
        h = y + m.attention(i - 1, y)
        X.append(h + m.feedforward(i - 1, h))
        a = (m.own(i) if i < m.L else m.head)["average"]
        y = X[i]
        if i % r.period == 0:
            y = sum((a[j] + (j == i)) * X[j] for j in range(i + 1) if (i - j) % r.dilation == 0)
    return y


def attention_residuals(m, r, x):
    given = []

    def read(p, s):
        sums = [sum(given[n : n + r.block]) for n in range(0, s, r.block)]
        v = np.stack([x, *sums])
        w = softmax((rms(v, r.epsilon) * p["scale"]) @ p["query"], axis=0)
        return (w[..., None] * v).sum(0)

    for s in range(2 * m.L):
        given.append(m.branch(s, read(m.own(s // 2)[("attention", "feedforward")[s % 2]], s)))
    return read(m.head, 2 * m.L)


def hyper_connections(m, r, x):
    N = r.streams
    X = np.stack([x] * N)
    for s in range(2 * m.L):
        p = m.own(s // 2)[("attention", "feedforward")[s % 2]]
        t = np.tanh(rms(X, r.epsilon) @ p["dynamic"])
        a = np.eye(N)[s % N] + p["read"]
        a = a[:, None, None] + p["scales"][0] * t[..., 0]
        A = (np.eye(N) + p["mix"])[:, None, None] + p["scales"][0] * t[..., 1:-1]
        b = (1 + p["write"])[:, None, None] + p["scales"][1] * t[..., -1]
        y = m.branch(s, sum(a[i][..., None] * X[i] for i in range(N)))
        X = np.stack([sum(A[i, ..., j, None] * X[i] for i in range(N)) + b[j][..., None] * y for j in range(N)])
    return X.sum(0)


def manifold(m, r, x):
    N = r.streams
    X = np.stack([x] * N)
    for s in range(2 * m.L):
        p = m.own(s // 2)[("attention", "feedforward")[s % 2]]
        flat = rms(np.concatenate(list(X), -1), r.epsilon)
        t = flat @ p["dynamic"].reshape(-1, N * N + 2 * N)
        pre = sigmoid(p["scales"][0] * t[..., :N] + p["read"])
        post = 2 * sigmoid(p["scales"][1] * t[..., N : 2 * N] + p["write"])
        R = np.exp(p["scales"][2] * t[..., 2 * N :].reshape(*t.shape[:2], N, N) + p["mix"])
        for _ in range(r.iterations):
            R = R / R.sum(-2, keepdims=True)
            R = R / R.sum(-1, keepdims=True)
        y = m.branch(s, sum(pre[..., i, None] * X[i] for i in range(N)))
        X = np.stack([sum(R[..., i, j, None] * X[j] for j in range(N)) + post[..., i, None] * y for i in range(N)])
    return X.sum(0)


def deep_delta(m, r, x):
    V = r.channels
    X = np.stack([x] * V)

    def convolve(w, x):
        """A causal convolution over tokens, token by token; w [K, D]."""
        out = np.zeros_like(x)
        for t in range(x.shape[1]):
            for j in range(len(w)):
                if (at := t - (len(w) - 1) + j) >= 0:
                    out[:, t] += w[j] * x[:, at]
        return out

    if r.embedding == "convolution":
        X = np.stack([convolve(m.first["mix"][:, c], x) for c in range(V)])

    def compress(p):
        if p is not m.head and r.compressor == "tokens":
            p = p["compress"]
            return sum(p["read"][c] * convolve(p["mix"][:, c], X[c]) for c in range(V))
        if V == 1:
            return X[0]
        w, K = p["compress"]["mix"], p["compress"]["mix"].shape[0]
        left, out = (K - 1) // 2, 0
        for u in range(V):
            inside = [j for j in range(K) if 0 <= u + j - left < V]
            out = out + p["compress"]["read"][u] * sum(w[j] * X[u + j - left] for j in inside)
        return out

    for s in range(2 * m.L):
        own = m.own(s // 2)
        p = own[("attention", "feedforward")[s % 2]]
        h = compress(own)
        beta = 2 * sigmoid(rms(h) @ p["gate"]["weight"] + p["gate"]["bias"])
        match r.value:
            case "constant":
                v = np.full((*h.shape[:2], V), 2.0)
            case "linear":
                v = rms(h) @ p["value"]["weight"] + p["value"]["bias"]
            case "sigmoid":
                v = 4 * sigmoid(h @ p["value"]["weight"] + p["value"]["bias"])
        y = m.branch(s, h)
        k = y / np.sqrt((y * y).sum(-1, keepdims=True) + r.epsilon**2)
        old = [(k * X[c]).sum(-1) if r.update == "delta" else 0.0 for c in range(V)]
        X = np.stack([X[c] + (beta * (v[..., c] - old[c]))[..., None] * k for c in range(V)])
    return compress(m.head)


def elc_bert(m, r, x):
    H = [x]

    def average(logits):
        w = softmax(logits)
        return sum(w[i] * H[i] for i in range(len(H)))

    for layer in range(m.L):
        base = r.variant == "base"
        h = average(m.own(layer)["average"][: len(H)] + base * np.eye(len(H))[-1])
        a = m.attention(layer, h)
        out = a + m.feedforward(layer, a if base else h + a)
        if r.variant == "normalized":
            out = out - out.mean(-1, keepdims=True)
            out = out / np.sqrt((out * out).mean(-1, keepdims=True) + 1e-7)
        H.append(out)
    return average(m.head["average"]) if r.variant == "weighted_output" else H[-1]


def vertical(m, r, x):
    X = [x]
    for layer in range(m.L):
        w = softmax(m.own(layer)["average"][: len(X)])
        h = sum(w[j] * rms(X[j], r.epsilon) for j in range(len(X)))
        h = h + m.attention(layer, h)
        X.append(h + m.feedforward(layer, h))
    return X[-1]


def cross_attention(m, r, x):
    given = []

    def network(p):
        G = [x, *given]
        if r.latest is not None:
            middle, latest = given[: -r.latest], given[-r.latest :]
            G = [x, sum(middle, np.zeros_like(x)), *reversed(latest)]
        total = 0
        for i, g in enumerate(G):
            w = p["weights"][i] + (np.maximum(g @ p["dynamic"][i], 0)[..., None] if r.version == 3 else 0)
            total = total + w * g
        return total

    for layer in range(m.L):
        q, k, v = (network(m.own(layer)[name]) for name in ("query", "key", "value"))
        a = m.attention(layer, q, k, v)
        given.append(a + m.feedforward(layer, q + a))
    return network(m.head)


def mudd(m, r, x):
    X = [x]

    def sums(p):
        t = gelu(rms(X[-1], r.epsilon) * p["scale"] @ p["inner"])
        n = len(X)
        A = np.einsum("btk,kcn->btcn", t, p["outer"][..., :n]) + p["static"][:, :n]
        return [sum((A[..., c, j, None] + (j == n - 1)) * X[j] for j in range(n)) for c in range(A.shape[2])]

    for layer in range(m.L):
        q, k, v, h = sums(m.own(layer)["sums"]) if layer else [x] * 4
        gains = [m.own(layer)[name]["scale"] for name in ("key_norm", "value_norm")]
        h = h + m.attention(layer, q, k, v, gains)
        X.append(h + m.feedforward(layer, h))
    return sums(m.head)[0]


def depth_window(m, r, x):
    X = [x]
    for layer in range(m.L):
        p, near = m.own(layer), [rms(s, r.epsilon) for s in X[-r.window :]]
        scores = [((near[-1] @ p["query"]) * (s @ p["key"])).sum(-1) / np.sqrt(x.shape[-1]) for s in near]
        w = softmax(np.stack(scores), axis=0)
        h = X[-1] + sum(w[j][..., None] * (s @ p["value"]) for j, s in enumerate(near))
        h = h + m.attention(layer, h)
        X.append(h + m.feedforward(layer, h))
    return X[-1]


def short_window(m, r, x):
    for layer in range(m.L):
        p, n = m.own(layer), rms(x, r.epsilon)
        q, k, v = (n @ p[name] for name in ("query", "key", "value"))
        read = np.zeros_like(x)
        for t in range(x.shape[1]):
            near = slice(max(0, t - r.window + 1), t + 1)
            w = softmax((q[:, t, None] * k[:, near]).sum(-1) / np.sqrt(x.shape[-1]))
            read[:, t] = (w[..., None] * v[:, near]).sum(1)
        x = x + read
        x = x + m.attention(layer, x)
        x = x + m.feedforward(layer, x)
    return x


MIXERS = {
    "Plain": plain,
    "DenseFormer": dense_former,
    "AttentionResiduals": attention_residuals,
    "HyperConnections": hyper_connections,
    "ManifoldHyperConnections": manifold,
    "DeepDelta": deep_delta,
    "ElcBert": elc_bert,
    "VerticalAttention": vertical,
    "DeepCrossAttention": cross_attention,
    "MuddFormer": mudd,
    "DepthWindow": depth_window,
    "ShortWindow": short_window,
}
