"""Dynamic batching: requests of one example each, gathered to a batch until it is full or the first has waited long enough.

Source: the dynamic batcher of serving systems, as in Clipper, Crankshaw et al. 2017 (NSDI).
"""

import queue
import threading
import time
from concurrent.futures import Future

from workbench.batches import Inputs, joined, mapped
from workbench.deployment import sessions


class Batcher:
    """Serves one model to many callers: `submit(example)` gives a Future of its output.

    size: examples a batch at most; 1 is no batching. Shorter sentences are padded with zeros, their masks too. deadline_ms:
    how long the first of a batch waits for others at most. One thread runs the model, batch after batch. To be used in a
    `with` block, at whose end what waits is still served.

    Raises ValueError for a size below 1 or a negative deadline; what the model raises, each Future of the batch raises.

    Example: `with Batcher("model.onnx", size=16, deadline_ms=2) as served: served.submit(image).result()`
    """

    def __init__(self, model, *, size: int = 16, deadline_ms: float = 2.0, threads: int | None = None):
        if size < 1 or deadline_ms < 0:
            raise ValueError(f"batcher: size is {size} and deadline_ms {deadline_ms}; expected at least 1, and 0 or more")
        self.session = sessions.open(model, threads=threads)
        self.size, self.deadline = size, deadline_ms / 1e3
        self.batches: list[int] = []  # the size of each batch that was run
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._open, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "Batcher":
        self._open = True
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        with self._lock:
            self._open = False
            self._waiting.put(None)
        self._thread.join()

    def submit(self, example: Inputs) -> Future:
        """The Future of one example's output, float32 (...,). example: inputs without the batch axis, such as float32 (C, H, W)
        or {"input_ids": int64 (L,), ...}. It may be cancelled while it waits.

        Raises ValueError outside the `with` block.
        """
        answer: Future = Future()
        with self._lock:
            if not self._open:
                raise ValueError("this batcher is closed; use it inside its with block")
            self._waiting.put((mapped(lambda value: value[None], example), answer))
        return answer

    def _serve(self) -> None:
        while True:
            first = self._waiting.get()
            if first is None:
                return
            batch, last = self._gather(first)
            batch = [(example, answer) for example, answer in batch if answer.set_running_or_notify_cancel()]
            try:
                outputs = self.session(joined([example for example, _ in batch])) if batch else ()
                for (_, answer), output in zip(batch, outputs, strict=True):
                    answer.set_result(output)
            except Exception as error:  # of any kind: it belongs to the callers, and the next batch may be well
                for _, answer in batch:
                    answer.set_exception(error)
            if batch:
                self.batches.append(len(batch))
            if last:
                return

    def _gather(self, first) -> tuple[list, bool]:
        batch, until = [first], time.perf_counter() + self.deadline
        while len(batch) < self.size:
            try:
                following = self._waiting.get(timeout=max(until - time.perf_counter(), 0)) if self.deadline else \
                    self._waiting.get_nowait()
            except queue.Empty:
                return batch, False
            if following is None:
                return batch, True
            batch.append(following)
        return batch, False
