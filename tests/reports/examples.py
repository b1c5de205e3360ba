"""A made-up run: three rounds, two clients."""

from hsplit_flwr.reports.records import ClientRecord, RoundRecord, RunSummary

CENTRAL, FEDERATED = (41.5, 20.25, 10.125), (44.0, 22.0, 11.0)


def client(client_id: int, number: int) -> ClientRecord:
    return ClientRecord(
        client_id=str(client_id),
        cut=2 if number < 3 else 3,
        ranks=f"2-{4 + client_id}",
        mean_rank=3.5,
        tokens=1000 * (client_id + 1),
        steps=20,
        loss=4.0 - number / 2,
        bytes_up=1_500_000 * (client_id + 1),
        bytes_down=250_000,
        seconds={"load": 0.25, "compute": 12.5, "exchange": 0.004},
    )


def round_record(number: int, clients: int = 2) -> RoundRecord:
    return RoundRecord(
        round=number,
        central_perplexity=CENTRAL[(number - 1) % 3],
        federated_perplexity=FEDERATED[(number - 1) % 3],
        train_loss=3.25,
        clients=tuple(client(i, number) for i in reversed(range(clients))),
        failures=("client 7: UNAVAILABLE",) if number == 2 else (),
        seconds={"configure": 0.01, "fit": 16.0, "aggregate": 0.2, "evaluate": 4.0},
    )


def run_summary(rounds: int = 3, clients: int = 2) -> RunSummary:
    return RunSummary(
        initial_perplexity=812.5,
        history=tuple(round_record(number, clients) for number in range(1, rounds + 1)),
        seed=7,
        versions={"python": "3.11.7", "torch": "2.13.0", "hsplit_flwr": None},
        commit="0123abc",
        command="flwr run .",
        wall_seconds=83.4,
        config={"local-steps": 20, "model": "tiny"},
        adapter={"max_rank": 64, "relative_error": 0.0123, "exact": False, "ranks": {"m": 64}},
        samples=({"prompt": "name : Alimentum", "generated": "Alimentum is cheap — très bon."},),
    )
