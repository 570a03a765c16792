"""Download the next checkpoint while one computes, and remove downloaded weights from the cache afterwards."""

from concurrent.futures import Future, ThreadPoolExecutor

from .find import Checkpoint


class Downloads:
    """Manages the cache of weights during a sweep.

    Args:
        prefetch: download the next checkpoint in advance.
        free: remove a checkpoint after its cells, unless it was in the cache before this run.
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
        """Note that `checkpoint` is computed now, and begin to download the one that follows.

        huggingface_hub locks each file, so that whoever loads the weights waits for a download in progress. If the
        download fails, the cell tries again and records the error.
        """
        self._claim(checkpoint)
        self._coming.pop(checkpoint, None)
        if self.prefetch and following is not None and following not in self._coming:
            self._claim(following)
            self._coming[following] = self._thread.submit(following.download)

    def finish(self, checkpoint: Checkpoint) -> None:
        """Note that all cells of `checkpoint` are done; with `free`, remove its weights."""
        if self.free and checkpoint in self._ours:
            checkpoint.forget()

    def _claim(self, checkpoint: Checkpoint) -> None:
        if self.free and checkpoint not in self._coming and not checkpoint.is_cached():
            self._ours.add(checkpoint)
