import gc
import os
import signal
import threading

import pytest

from hf_moe.quickstart.interrupt import noticing_interrupts


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the handler runs at one of the next bytecodes
        pass


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_is_raised_as_usual():
    with noticing_interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
        assert interrupts.pending


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_in_a_finaliser_is_raised_at_the_next_check():
    class Finalised:
        def __del__(self):
            press_ctrl_c()

    with noticing_interrupts() as interrupts:
        item = Finalised()
        del item
        gc.collect()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_without_ctrl_c_nothing_is_raised_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with noticing_interrupts() as interrupts:
        assert signal.getsignal(signal.SIGINT) is not before
        interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_changes_nothing():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run():
        with noticing_interrupts() as interrupts:
            interrupts.check()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
