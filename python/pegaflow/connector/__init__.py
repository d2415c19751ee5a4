"""What vLLM loads with `"kv_connector": "PegaKVConnector", "kv_connector_module_path": "pegaflow.connector"`."""

from pegaflow.connector.connector import PegaKVConnector

__all__ = ["PegaKVConnector"]
