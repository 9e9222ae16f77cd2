"""Measure before you train: exact bytes, and what keeps the tensors that a method wants to free.

Sampling a linear's input frees nothing while another operation holds the same tensor: fused
attention holds its own output, which the output projection reads.
"""

import toy

import leantune as lt

MIB = 2**20


def main() -> list[tuple[str, ...]]:
    """Print both reports for an encoder and a decoder; return the linears that free nothing."""
    found = []
    for model in (toy.encoder(), toy.decoder()):
        rows = toy.Rows(16)
        labels = rows.labels if model.config.model_type == "bert" else rows.ids
        batch = {"input_ids": rows.ids, "attention_mask": rows.mask, "labels": labels}
        print(f"\n{type(model).__name__}")
        print(lt.ledger(model, batch).table(depth=2))

        for held in lt.still_held(model, batch, lt.WTACRS(keep_ratio=0.1)):
            readers = ", ".join(held.linears)
            holders = ", ".join(f"{module} ({what})" for module, what in held.holders)
            print(f"{held.num_bytes / MIB:.2f} MiB of {readers} stay, kept by {holders}")
            found.append(held.linears)
    return found


if __name__ == "__main__":
    main()
