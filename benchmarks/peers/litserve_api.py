"""The peer's model as a LitServe API; its worker process imports this file anew."""

from typing import Any

import litserve as ls
from serve import FOLDER, Model


class PeerApi(ls.LitAPI):
    """Answers one row a request."""

    def setup(self, device: str) -> None:
        """Load the module once."""
        self.model = Model(FOLDER)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """The row."""
        return request["row"]

    def predict(self, row: dict[str, Any]) -> dict[str, Any]:
        """Class and probabilities."""
        return self.model.answer([row])[0]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return output
