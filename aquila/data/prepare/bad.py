"""What is said of a document that cannot be taken."""


class BadDocumentError(Exception):
    """A document that cannot be taken; the message is the reason."""
