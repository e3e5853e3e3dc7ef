"""Stand-in: nothing of it runs."""

from tools.ports.closed import inert

inert.answer_for(__name__)
