"""What each host of a prefix needs: transformers models through their attention interface, and PEFT models."""
