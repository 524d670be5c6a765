from tests.client.conftest import fake

__all__ = ["fake"]
