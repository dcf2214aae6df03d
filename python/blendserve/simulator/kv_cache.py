"""The engine's KV memory with its radix cache, on the static prefix tree of a job.

Pages of one token, SGLang's default. A cache entry is what SGLang has as a radix node, which it
evicts as a whole: the shared segment of an inner node, but no more of it than one chunk of prefill
(every chunk becomes a node of its own), or what a finished request leaves beyond the prefixes it
shares (its tail). Entries on the path of a running request are
locked. A node is only ever evicted after all that continues it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from blendserve.planner import PrefixTree

from .foresight import Foresight

# With foresight, this part of the memory is freed at a time: looking ahead is not for nothing.
_EVICTED_AT_ONCE = 0.01


class KVCache:
    """Tokens of KV memory: locked ones of running requests, and cached ones that may be evicted.

    capacity: tokens. chunk_tokens: where prompts are cut, if they are. foresight: None for LRU,
    which keeps tails and evicts what was not used for longest. With a plan's foresight, what is
    never used again is dropped at once, and what is used farthest in the future goes first
    (Belady).
    Counts in `evicted_tokens` what was evicted for want of memory, and in `evicted_shared_tokens`
    the part of it that is in inner nodes.
    """

    def __init__(
        self,
        tree: PrefixTree,
        capacity: int,
        foresight: Foresight | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.locked = 0
        self.evictable = 0
        self.locked_shared = 0  # The part of `locked` that is in inner nodes.
        self.evicted_tokens = 0
        self.evicted_shared_tokens = 0
        self._foresight = foresight
        self._parent: list[int] = tree.parent.tolist()
        self._depth: list[int] = tree.depth.tolist()
        # Of each entry, the tree's node that it is part of; longer segments than a chunk are cut,
        # and their last parts keep the numbers of the nodes.
        self._node = list(range(tree.num_nodes))
        if chunk_tokens is not None:
            for node in range(1, tree.num_nodes):
                self._cut(node, chunk_tokens)
        above = [self._depth[parent] if parent >= 0 else 0 for parent in self._parent]
        self._edge = [depth - a for depth, a in zip(self._depth, above, strict=True)]
        entries = len(self._node)
        self._locks = [0] * entries
        self._resident = bytearray(entries)
        self._resident[0] = 1
        self._filling = bytearray(entries)
        # Unlocked entries, least recently used first: node, or -1 - request for a tail.
        self._unlocked: OrderedDict[int, int] = OrderedDict()

    def _cut(self, node: int, chunk_tokens: int) -> None:
        parent, depth = self._parent[node], self._depth[node]
        for at in range(self._depth[parent] // chunk_tokens + 1, -(-depth // chunk_tokens)):
            self._node.append(node)
            self._parent.append(parent)
            self._depth.append(at * chunk_tokens)
            parent = len(self._node) - 1
        self._parent[node] = parent

    @property
    def free(self) -> int:
        """Tokens that hold nothing; evictable ones are not among them. Negative where what has
        started is yet to be made room for."""
        return self.capacity - self.locked - self.evictable

    def find(self, node: int) -> tuple[int, int, int]:
        """(cached, held, filling) prefix tokens of a request that hangs from this node: in the
        cache; locked by running requests; and not yet computed by those that are at it."""
        resident, locks, parent = self._resident, self._locks, self._parent
        at = node
        while not resident[at]:
            at = parent[at]
        cached = at
        while at and not locks[at]:
            at = parent[at]
        held = at
        filling = 0
        while self._filling[at]:  # What is being computed is locked by who computes it.
            filling += self._edge[at]
            at = parent[at]
        return self._depth[cached], self._depth[held], filling

    def held(self, node: int) -> tuple[int, int]:
        """The deepest entry on a request's path that running requests lock, and its depth."""
        locks, parent = self._locks, self._parent
        while node and not locks[node]:
            node = parent[node]
        return node, self._depth[node]

    def path(self, node: int) -> Iterator[int]:
        """The entries that a request which hangs from `node` needs, the deepest first."""
        while node:
            yield node
            node = self._parent[node]

    def start(self, node: int, own_tokens: int) -> tuple[int, int]:
        """A request starts: its path is locked, what of it is missing is taken from memory, and so
        are its own tokens. Returns the entry that it found cached, which `filled` needs, and the
        prefix tokens down to there.

        The caller makes room for it, before or after: see `make_room`.
        """
        resident, locks, parent, edge = self._resident, self._locks, self._parent, self._edge
        at = node
        while not resident[at]:
            resident[at] = 1
            self._filling[at] = 1
            self.locked += edge[at]
            self.locked_shared += edge[at]
            locks[at] += 1
            at = parent[at]
        found = at
        while at:
            locks[at] += 1
            if locks[at] > 1:
                break
            del self._unlocked[at]
            self.evictable -= edge[at]
            self.locked += edge[at]
            self.locked_shared += edge[at]
            at = parent[at]
        self.locked += own_tokens
        return found, self._depth[found]

    def filled(self, node: int, found: int) -> None:
        """The prefix of a request that hangs from `node` is computed and can be shared."""
        while node != found:
            self._filling[node] = 0
            node = self._parent[node]

    def grow(self, tokens: int) -> None:
        """Running requests produced tokens; the caller has made room."""
        self.locked += tokens

    def end(self, node: int, request: int, own_tokens: int, keep: bool = True) -> None:
        """A request ends. What it alone holds becomes a tail in the cache, or is free at once
        where the plan says that nobody will use it (or keep is false: it was retracted)."""
        self.locked -= own_tokens
        foresight = self._foresight
        if keep and foresight is None and own_tokens:
            self._unlocked[-1 - request] = own_tokens
            self.evictable += own_tokens
        locks, parent, edge = self._locks, self._parent, self._edge
        while node:
            locks[node] -= 1
            if locks[node]:
                return
            self.locked -= edge[node]
            self.locked_shared -= edge[node]
            if foresight is not None and not foresight.waiting(self._node[node]):
                self._resident[node] = 0
            else:
                self._unlocked[node] = edge[node]
                self.evictable += edge[node]
            node = parent[node]

    def make_room(self, tokens: int) -> bool:
        """Evict until this many tokens are free; false when even an empty cache is not enough."""
        missing = tokens - self.free
        if missing <= 0:
            return True
        if missing > self.evictable:
            return False
        if self._foresight is None:
            while missing > 0:
                missing -= self._evict(next(iter(self._unlocked)))
            return True
        missing = max(missing, min(int(_EVICTED_AT_ONCE * self.capacity), self.evictable))
        # A node is used no later than what continues it: of equals, the deepest goes first.
        ranked = sorted(
            (
                (self._foresight.distance(self._node[entry]), self._depth[entry], entry)
                for entry in self._unlocked
            ),
            reverse=True,
        )
        for _, _, node in ranked:
            if missing <= 0:
                break
            missing -= self._evict(node)
        return True

    def _evict(self, entry: int) -> int:
        tokens = self._unlocked.pop(entry)
        self.evictable -= tokens
        self.evicted_tokens += tokens
        if entry > 0:
            self._resident[entry] = 0
            self.evicted_shared_tokens += tokens
        return tokens
