"""Packs: the KV of a prompt in portable form, exported from a store to a folder or the Hub, and imported into a store again."""

from cake_hf.packs.contents import Progress
from cake_hf.packs.export import export_pack
from cake_hf.packs.importing import Imported, import_pack
from cake_hf.packs.publish import Pushed, push_pack

__all__ = ["Imported", "Progress", "Pushed", "export_pack", "import_pack", "push_pack"]
