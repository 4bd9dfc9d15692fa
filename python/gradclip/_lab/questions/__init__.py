"""The questions of the laboratory, in the order of the report."""

from __future__ import annotations

from gradclip._lab.questions._base import Question, Rows, frame
from gradclip._lab.questions.clipping import Clipping
from gradclip._lab.questions.grids import Depth, Initialisation, Normalisation, Regularisation
from gradclip._lab.questions.growth import Growth
from gradclip._lab.questions.learning_rate import LearningRate
from gradclip._lab.questions.recurrent import Recurrent
from gradclip._lab.questions.relu_tanh import ReluTanh
from gradclip._lab.questions.remedies import Remedies
from gradclip._lab.questions.watching import Cost, Warning

__all__ = ["QUESTIONS", "Question", "Rows", "frame"]

QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        Growth(),
        ReluTanh(),
        Initialisation(),
        Depth(),
        LearningRate(),
        Clipping(),
        Regularisation(),
        Normalisation(),
        Recurrent(),
        Remedies(),
        Warning(),
        Cost(),
    )
}
