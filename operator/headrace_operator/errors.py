"""Errors of the operator.

    OperatorError
    ├── SettingsInvalid     an environment variable is missing or wrong
    ├── ConnectionInvalid   neither a service account nor a usable kubeconfig
    └── ApiError            the API server refused or failed
        ├── NotFound        there is no such object
        ├── KindNotServed   the API server does not know the kind
        ├── Conflict        the object exists already, or is another one by now
        ├── Expired         a watch or a listing asks for what is forgotten by now
        ├── Forbidden       the service account lacks a permission
        ├── NamespaceTerminating    nothing can be made there any more
        ├── Invalid         the object breaks a rule of the API server
        └── Unavailable     no answer, or an answer that asks to try again

Everything that talks to the API server raises an ApiError and nothing else.
"""
# Class names are the reasons in metrics and conditions, which carry no "Error" suffix.
# ruff: noqa: N818


class OperatorError(Exception):
    """Base of all errors the operator raises on purpose."""


class SettingsInvalid(OperatorError):
    """An environment variable is missing or has a wrong value."""


class ConnectionInvalid(OperatorError):
    """There are no usable credentials for the API server."""


class ApiError(OperatorError):
    """The API server refused a request, or there was no answer."""

    @property
    def reason(self) -> str:
        """One word for metrics and conditions: the class's own name."""
        return type(self).__name__


class NotFound(ApiError):
    """There is no such object."""


class KindNotServed(ApiError):
    """The API server does not serve the kind: a CRD is missing or Kubernetes is too old."""


class Conflict(ApiError):
    """The object exists already, or a precondition failed."""


class Expired(ApiError):
    """The API server has forgotten the version that a watch or listing continues from."""


class Forbidden(ApiError):
    """The operator's service account lacks a permission."""


class NamespaceTerminating(ApiError):
    """The namespace is being deleted, so nothing can be made in it any more."""


class Invalid(ApiError):
    """The object breaks a rule of the API server; trying again does not help."""


class Unavailable(ApiError):
    """The API server gave no answer or asked to try again, after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
