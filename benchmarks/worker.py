"""The process that measures. It may crash or hang without harm to its parent, benchmarks.runner.

stdin: a plan, {"device", "mode", "rounds", "case_limit_s", "peers", "ceilings" (True to measure
them), "work": [{"case", "contenders"}]}.
Events go out as JSON lines through the inherited file descriptor BENCHMARK_EVENTS_FD:

    contender    name, suite, version or reason          whether it can run here
    begin        case, contender, limit_s                next: prepare, call and check it
    timing       case, contenders, limit_s               next: time them side by side
    record       a measurement (see docs/benchmarks.md)  measured, wrong, failed or skipped
    ceilings     values                                  the roofline's two lines
    done
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback

import torch

from . import timing
from .cases import Case
from .contenders import Contender, contenders_for
from .problems import PROBLEMS, Problem, Run, UnsupportedError, WrongResultError

COMPILE_LIMIT_S = 150.0
CEILINGS_LIMIT_S = 60.0
SECONDS_PER_CASE = {"cpu": 6.0, "cuda": 4.0}
DEAD_CONTEXT = 71  # exit status if the CUDA context no longer works


class Worker:
    def __init__(self, plan: dict, events: int):
        self.plan = plan
        self.device: str = plan["device"]
        self.limit_s: float = plan["case_limit_s"]
        self._events = os.fdopen(events, "w", buffering=1)
        self._threads = torch.get_num_threads()
        self._meter: timing.EnergyMeter | None = None
        self._meter_missing: str | None = None
        if self.device == "cuda":
            try:
                self._meter = timing.EnergyMeter()
            except (OSError, RuntimeError) as error:  # NVML or the counter is missing
                self._meter_missing = _reason(error)

    def emit(self, event: str, **fields: object) -> None:
        print(json.dumps({"event": event, **fields}), file=self._events)

    def main(self) -> None:
        work = [(Case.from_dict(item["case"]), item["contenders"]) for item in self.plan["work"]]
        suites = {case.suite for case, _ in work}
        contenders = {
            (contender.suite, contender.name): contender
            for contender in contenders_for(self.device, self.plan["peers"])
            if contender.suite in suites
        }
        available = {key for key, contender in contenders.items() if self.announce(contender)}
        if self.plan["ceilings"]:
            self.emit("begin", case=None, contender="ceilings", limit_s=CEILINGS_LIMIT_S)
            self.emit("ceilings", values=timing.measure_ceilings(self.device))
        for case, names in work:
            chosen = [contenders[case.suite, n] for n in names if (case.suite, n) in available]
            if self.plan["mode"] == "warm-up":
                chosen = [contender for contender in chosen if contender.compiles]
            if chosen:
                self.measure(case, chosen)
                gc.collect()
                if self.device == "cuda":
                    torch.cuda.empty_cache()
        self.emit("done")

    def announce(self, contender: Contender) -> bool:
        who = {"name": contender.name, "suite": contender.suite}
        self.emit("begin", case=None, contender=contender.name, limit_s=COMPILE_LIMIT_S)
        try:
            self.emit("contender", **who, version=contender.require(self.device))
        except Exception as error:  # an unusable package may raise anything
            self.emit("contender", **who, reason=_reason(error))
            return False
        return True

    def measure(self, case: Case, contenders: list[Contender]) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(self._threads)  # for preparations and checks
        problem = PROBLEMS[case.suite](case, self.device)
        runs, errors = {}, {}
        for contender in contenders:
            limit = COMPILE_LIMIT_S if contender.compiles else self.limit_s
            self.emit("begin", case=case.name, contender=contender.name, limit_s=limit)
            try:
                run = contender.prepare(problem)
                errors[contender.name] = self.first_call(run)
                runs[contender.name] = run
            except UnsupportedError as error:
                self.record(case, contender.name, "skipped", reason=str(error))
            except WrongResultError as error:
                self.record(case, contender.name, "wrong", reason=str(error), error=error.error)
            except Exception as error:  # a contender's failure is a result, not the end of the run
                traceback.print_exc()
                self.record(case, contender.name, "failed", reason=_reason(error))
                self.exit_if_context_is_dead()
        if not runs or self.plan["mode"] == "warm-up":
            return
        self.emit("timing", case=case.name, contenders=list(runs), limit_s=self.limit_s)
        torch.set_num_threads(case.threads or self._threads)
        times = timing.interleave(
            runs, self.device, self.plan["rounds"], SECONDS_PER_CASE[self.device]
        )
        for name, run in runs.items():
            figures = self.figures(problem, run, times[name]) | self.extras(case, run)
            self.record(case, name, "ok", error=errors[name], **figures)

    def first_call(self, run: Run) -> dict:
        if run.before:
            run.before()
        result = run.call()
        return {} if self.plan["mode"] == "warm-up" else run.check(result)

    def figures(self, problem: Problem, run: Run, seconds: list[float]) -> dict:
        summary = timing.summarize(seconds)
        median = summary["median"] / 1e3
        traffic = run.bytes or problem.bytes
        return {
            "milliseconds": summary,
            "flops_per_s": problem.flops / median if problem.flops else None,
            "bytes_per_s": traffic / median if traffic else None,
        }

    def extras(self, case: Case, run: Run) -> dict:
        extras: dict[str, object] = {}
        if case.host:
            extras["host_microseconds"] = timing.host_microseconds(run, self.device)
        if self.device != "cuda":
            return extras
        if case.energy and self._meter:
            extras["joules"] = self._meter.joules(run)
        elif case.energy:
            extras["joules_missing"] = self._meter_missing
        return extras

    def record(self, case: Case, contender: str, status: str, **fields: object) -> None:
        if self.plan["mode"] == "warm-up":
            return
        values = {**case.as_dict(), "case": case.name, "contender": contender, "status": status}
        self.emit("record", values=values | fields)

    def exit_if_context_is_dead(self) -> None:
        """Ends the process if CUDA calls fail, as all do after an illegal access; the runner starts
        another."""
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the CUDA context is dead: {error}", file=sys.stderr, flush=True)
            os._exit(DEAD_CONTEXT)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


if __name__ == "__main__":
    Worker(json.load(sys.stdin), int(os.environ["BENCHMARK_EVENTS_FD"])).main()
