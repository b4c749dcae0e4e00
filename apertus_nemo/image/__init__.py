"""Images: references, OCI manifests, registries, and squashfs files made from them."""
