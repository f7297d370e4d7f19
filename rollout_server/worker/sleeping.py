"""vLLM's memory pool of a sleeping engine. Runs in the engine's process."""


def unmap_woken(tag: str) -> int:
    """Put what of `tag` is mapped to sleep again, without its contents. Bytes given back."""
    from vllm.device_allocator import cumem

    given_back = 0
    for data in cumem.CuMemAllocator.get_instance().pointer_to_data.values():
        if data.tag == tag and not data.is_asleep:
            try:
                cumem.unmap_and_release(data.handle)
            finally:
                data.is_asleep = True
            given_back += data.handle[1]
    return given_back
