"""One thread that owns the model, and a queue before it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.runtime.stream import Piece, check_room
from bitfloor.runtime.text_model import TextModel
from bitfloor.serving.errors import ApiError, wrong
from bitfloor.serving.requests import Ask


@dataclass(frozen=True)
class Started:
    """An answer is being made."""

    prompt_tokens: int


Event = Started | Piece | ApiError


class Job:
    """One request on its way.

    Args:
        ask: what is wanted.
        emit: called by the worker's thread with :class:`Started`, then pieces, or with an error that ends it.
    """

    def __init__(self, ask: Ask, emit: Callable[[Event], None]) -> None:
        self.ask = ask
        self.emit = emit
        self.cancelled = threading.Event()


class Worker:
    """Answers one job after another.

    Args:
        model: nobody else may use it meanwhile.
        most_waiting: jobs that may wait; the one that is being answered does not count.
    """

    def __init__(self, model: TextModel, most_waiting: int) -> None:
        self._model = model
        self._most_waiting = most_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        # A thread in the middle of a long prompt must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="bitfloor-worker", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether an answer is being made."""
        return self._running is not None

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            ApiError: the queue is full, or the worker is closed.
        """
        with self._changed:
            if self._closed:
                raise closing()
            room = self._most_waiting + (self._running is None)  # the one that is answered next does not wait
            if len(self._waiting) >= room:
                message = f"{len(self._waiting)} requests are waiting and there is room for no more; try again later."
                raise ApiError(429, message, code="queue_full")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give a job up: it leaves the queue, or its answer ends before the next token. Nothing if it is over."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Take no more jobs and end those there are, with an error. Does not wait."""
        with self._changed:
            self._closed = True
            given_up = [*self._waiting]
            self._waiting.clear()
            if self._running is not None:
                self._running.cancelled.set()
            self._changed.notify()
        for job in given_up:
            job.emit(closing())

    def join(self, seconds: float) -> None:
        """Wait for the thread to end after :meth:`close`."""
        self._thread.join(seconds)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._answer(job)
            except ApiError as error:
                job.emit(error)
            except InputError as error:
                job.emit(wrong(None, str(error)))
            except BitfloorError as error:
                job.emit(ApiError(500, str(error)))
            except Exception as error:  # the next job may fare better, and its client waits
                text = " ".join(str(error).split())
                job.emit(ApiError(500, f"unexpected {type(error).__name__}: {text or 'no message'}."))

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _answer(self, job: Job) -> None:
        param = "messages" if job.ask.chat else "prompt"
        try:
            ids = self._encode(job.ask)
        except InputError as error:
            raise wrong(param, str(error)) from error
        try:
            check_room(len(ids), self._model.context)
        except InputError as error:
            raise wrong(param, str(error), "context_length_exceeded") from error
        job.emit(Started(len(ids)))
        for piece in self._model.stream(ids, job.ask.settings, job.cancelled.is_set):
            if piece.ended == "cancelled":
                raise closing()  # read by nobody if the client has gone
            job.emit(piece)

    def _encode(self, ask: Ask) -> list[int]:
        # Here and not where requests are read: a tokenizer is not for two threads at once.
        if isinstance(ask.prompt, str):
            return self._model.encode(ask.prompt)
        if ask.chat:
            return self._model.encode_chat([m for m in ask.prompt if not isinstance(m, int)])
        ids = [token for token in ask.prompt if isinstance(token, int)]
        self._model.check_ids(ids)
        return ids


def closing() -> ApiError:
    """What is told to those who wait while the server ends."""
    return ApiError(503, "The server is shutting down.", code="shutting_down")
