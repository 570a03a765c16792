"""Weights from the Hub just in time: the next checkpoint is fetched while one computes, and removed afterwards."""

from concurrent.futures import Future, ThreadPoolExecutor

from .find import Checkpoint


class Downloads:
    """The cache of weights during a sweep.

    Args:
        prefetch: download the checkpoint that comes next.
        free: after its cells, remove a checkpoint that was not in the cache before this run.
    """

    def __init__(self, prefetch: bool, free: bool) -> None:
        self.prefetch, self.free = prefetch, free
        self._thread = ThreadPoolExecutor(1)
        self._coming: dict[Checkpoint, Future[None]] = {}
        self._ours: set[Checkpoint] = set()

    def __enter__(self) -> "Downloads":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def start(self, checkpoint: Checkpoint, following: Checkpoint | None) -> None:
        """`checkpoint` is computed now; begin to fetch the one that follows. A download that still runs is waited for
        where the weights are read: huggingface_hub locks each file. One that fails is tried again, and recorded, by the
        cell itself."""
        self._claim(checkpoint)
        self._coming.pop(checkpoint, None)
        if self.prefetch and following is not None and following not in self._coming:
            self._claim(following)
            self._coming[following] = self._thread.submit(following.download)

    def finish(self, checkpoint: Checkpoint) -> None:
        """All cells of `checkpoint` are done."""
        if self.free and checkpoint in self._ours:
            checkpoint.forget()

    def _claim(self, checkpoint: Checkpoint) -> None:
        if self.free and checkpoint not in self._coming and not checkpoint.is_cached():
            self._ours.add(checkpoint)
