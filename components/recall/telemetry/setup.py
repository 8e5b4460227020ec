"""Opens the traces that the environment asks for."""

from components.exceptions import ConfigError
from components.recall.telemetry.tracing import Tracing
from components.settings import Settings


def open_tracing(settings: Settings, service: str) -> Tracing:
    """Traces as the environment asks for them.

    Args:
        settings: Where spans go.
        service: Name of the process, unless OTEL_SERVICE_NAME gives it another.

    Raises:
        ConfigError: The libraries are not installed.
    """
    if not settings.otlp_endpoint:
        return Tracing()
    try:
        from components.recall.telemetry.otel import export_spans
    except ImportError as error:
        raise ConfigError(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            expected="the OpenTelemetry SDK and its exporter",
            got=error,
            remedy="install the extra `otel`, or unset the variable",
        ) from error
    return export_spans(service)
