"""A plugin of one's own: answers in capitals, and keeps secrets to itself.

In config.toml:

    [plugins.shout]
    enabled = true
    module = "shout"            # a file shout.py somewhere on PYTHONPATH
    secret = "open sesame"
"""

from plugins import STOP
from providers import Answer


class Shout:
    def __init__(self, settings):
        self.secret = settings.get("secret", "")
        if not isinstance(self.secret, str):
            raise ValueError("secret: must be a string")

    def on_start(self, request):
        """Before anything is decided: None goes on, STOP refuses, an Answer is the answer."""
        if self.secret and self.secret in request.text():
            return STOP
        if request.text() == "ping":
            answer = Answer()
            answer.text = "PONG"
            return answer
        return None

    def pre_request(self, request):
        """What is changed here is what the provider gets."""
        request.temperature = 0.0

    def post_response(self, request, answer):
        """With the whole answer in hand; streams have left by then and pass as they came."""
        answer.text = answer.text.upper()


plugin = Shout
