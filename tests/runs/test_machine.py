"""What a run asks of the machine."""

import platform

import pytest

from processes import Running


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's allocator")
def test_activations_reuse_memory():
    """The pages of a freed activation serve the next one instead of being mapped again."""
    code = """
        import resource, torch
        from classroomkd.runs.machine import keep_freed_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(16, 1024, 1024)  # 64 MiB
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        before = faults()
        keep_freed_memory()
        faults()
        print(before, faults())
    """
    result = Running(code).wait()
    before, after = map(int, result.stdout.split())
    assert before > 20 * 16  # of 4 MiB or less: there is something to save
    assert after < 20, result.stderr
