"""Packs: the KV of a prompt, made to travel. Out of a store to a folder or the Hub, and into a store again."""

from cake_hf.packs.contents import Progress
from cake_hf.packs.export import export_pack
from cake_hf.packs.importing import Imported, import_pack
from cake_hf.packs.publish import Pushed, push_pack

__all__ = ["Imported", "Progress", "Pushed", "export_pack", "import_pack", "push_pack"]
