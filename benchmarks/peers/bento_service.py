"""The peer's model as a BentoML service."""

from typing import Any

import bentoml
from serve import FOLDER, Model


@bentoml.service(workers=1)
class PeerService:
    """Answers one row a request."""

    def __init__(self) -> None:
        self.model = Model(FOLDER)

    @bentoml.api
    def predict(self, row: dict[str, Any]) -> dict[str, Any]:
        """Class and probabilities."""
        return self.model.answer([row])[0]
