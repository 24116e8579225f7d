// Ordering between ordinary accesses and those of the asynchronous proxy (PTX ISA, "membar / fence", .proxy).
#pragma once

// Makes this thread's writes to shared memory visible to the products and copies that follow.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
