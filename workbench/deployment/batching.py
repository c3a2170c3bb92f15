"""Dynamic batching: requests of one example each, gathered to a batch until it is full or the first
has waited long enough.

Source: the dynamic batcher of serving systems, as in Clipper, Crankshaw et al. 2017 (NSDI).
"""

import bisect
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from workbench.batches import Inputs, joined, mapped, tensors
from workbench.deployment import sessions


class Batcher:
    """Serves one model to many callers: `submit(example)` gives a Future of its output.

    size: examples a batch at most; 1 is no batching. Shorter sentences are padded with zeros, their
    masks too. deadline_ms: how long the first of a batch waits for others at most. buckets: lengths
    of sentences up to which they share a batch, so that short ones are not padded to long ones;
    what is longer than all of them shares one more. One thread runs the model, batch after batch,
    each time the bucket whose first has waited longest. To be used in a `with` block, at whose end
    what waits is still served. `padding` says afterwards which share of what was computed was
    padding.

    Raises ValueError for a size below 1, a negative deadline or buckets that do not rise; what the
    model raises, each Future of the batch raises.

    Example: `with Batcher("model.onnx", size=16, deadline_ms=2) as served:
    served.submit(image).result()`
    """

    def __init__(self, model, *, size: int = 16, deadline_ms: float = 2.0,
                 buckets: Sequence[int] = (), threads: int | None = None):
        if size < 1 or deadline_ms < 0:
            raise ValueError(f"batcher: size is {size} and deadline_ms {deadline_ms}; expected at "
                             "least 1, and 0 or more")
        if any(a >= b for a, b in zip((0, *buckets), buckets, strict=False)):
            raise ValueError(f"batcher: buckets are {list(buckets)}; expected lengths that rise "
                             "from 1 on")
        self.session = sessions.open(model, threads=threads)
        self.size, self.deadline, self.buckets = size, deadline_ms / 1e3, list(buckets)
        self.batches: list[int] = []  # the size of each batch that was run
        # numbers along the first axis of the examples, and with what they were padded by
        self._given = self._computed = 0
        self._arrived: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting: list[deque] = [deque() for _ in range(len(buckets) + 1)]
        self._closed = False
        self._open, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "Batcher":
        self._open = True
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        with self._lock:
            self._open = False
            self._arrived.put(None)
        self._thread.join()

    @property
    def padding(self) -> float:
        """The share of what was computed, along the first axis of an example, that was padding."""
        return 1 - self._given / self._computed if self._computed else 0.0

    def submit(self, example: Inputs) -> Future:
        """The Future of one example's output, float32 (...,). example: inputs without the batch
        axis, such as float32 (C, H, W) or {"input_ids": int64 (L,), ...}. It may be cancelled while
        it waits.

        Raises ValueError outside the `with` block.
        """
        answer: Future = Future()
        with self._lock:
            if not self._open:
                raise ValueError("this batcher is closed; use it inside its with block")
            self._arrived.put((time.perf_counter(), mapped(lambda value: value[None], example),
                               answer))
        return answer

    def _serve(self) -> None:
        while batch := self._gather():
            batch = [(example, answer) for _, example, answer in batch
                     if answer.set_running_or_notify_cancel()]
            try:
                outputs = (self.session(self._joined([example for example, _ in batch])) if batch
                           else ())
                for (_, answer), output in zip(batch, outputs, strict=True):
                    answer.set_result(output)
            # of any kind: it belongs to the callers, and the next batch may be well
            except Exception as error:
                for _, answer in batch:
                    answer.set_exception(error)
            if batch:
                self.batches.append(len(batch))

    def _joined(self, examples: list[Inputs]) -> Inputs:
        lengths = [_length(example) for example in examples]
        self._given += sum(lengths)
        self._computed += len(lengths) * max(lengths)
        return joined(examples)

    def _gather(self) -> list:
        """The next batch: of the bucket whose first has waited longest, once it is full or that
        one's time is over. Empty at the end."""
        while True:
            oldest = min((kind for kind in self._waiting if kind), key=lambda kind: kind[0][0],
                         default=None)
            now = time.perf_counter()
            left = None if oldest is None else oldest[0][0] + self.deadline - now
            if oldest is not None and (len(oldest) >= self.size or left <= 0 or self._closed):
                self._receive(0.0)  # what has come meanwhile may fill it
                return [oldest.popleft() for _ in range(min(self.size, len(oldest)))]
            if self._closed:
                return []
            self._receive(left)

    def _receive(self, wait: float | None) -> None:
        """Sort what has arrived into its buckets, after waiting for the first of it so many seconds
        (None: until it comes)."""
        try:
            request = self._arrived.get(timeout=wait) if wait != 0 else self._arrived.get_nowait()
            while True:
                if request is None:
                    self._closed = True
                else:
                    self._waiting[bisect.bisect_left(self.buckets,
                                                     _length(request[1]))].append(request)
                request = self._arrived.get_nowait()
        except queue.Empty:
            return


def _length(example: Inputs) -> int:
    """How long an example (1, L, ...) is."""
    first = tensors(example)[0]
    return first.shape[1] if first.dim() > 1 else 1
