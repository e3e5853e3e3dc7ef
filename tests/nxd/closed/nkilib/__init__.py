"""Stand-in: nothing of it runs."""

import inert

inert.answer_for(__name__)
