"""The GPUs that programs can be compiled for, as XLA describes them (`GpuDeviceInfoProto`)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU.

    Args:
      description: as its driver gives it.
      capability: CUDA compute capability, `(major, minor)`.
      accelerated: whether the instructions of this architecture alone may be used (sm_90a).
      cores: streaming multiprocessors.
      core_memory: bytes of shared memory of a core.
      block_memory: bytes of it that one block may ask for.
      bandwidth: of its memory, bytes a second.
      cache: bytes of its level-2 cache.
      clock: GHz.
      memory: bytes of its memory.
    """

    description: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    core_memory: int
    block_memory: int
    bandwidth: int
    cache: int
    clock: float
    memory: int

    @property
    def text(self) -> str:
        """The target as the text that XLA reads."""
        major, minor = self.capability
        feature = "feature_extension: ACCELERATED_FEATURES" if self.accelerated else ""
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
              core_count: {self.cores}
              shared_memory_per_core: {self.core_memory}
              shared_memory_per_block_optin: {self.block_memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.cache}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              threads_per_block_limit: 1024
              threads_per_warp: 32
              threads_per_core_limit: {1536 if self.capability == (8, 9) else 2048}
              shared_memory_per_block: 49152
              fpus_per_core: {64 if self.capability == (8, 0) else 128}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 }}
            device_description_str: "{self.description}"
        """


TARGETS = {
    "h100": Target(
        "NVIDIA H100 80GB HBM3", (9, 0), True, 132, 233472, 232448, 3352320000000, 50 << 20, 1.98, 84929347584
    ),
    "a100": Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 167936, 166912, 2039000000000, 40 << 20, 1.41, 84987740160
    ),
    "rtx4090": Target(
        "NVIDIA GeForce RTX 4090", (8, 9), False, 128, 102400, 101376, 1008000000000, 72 << 20, 2.52, 24564 << 20
    ),
}
