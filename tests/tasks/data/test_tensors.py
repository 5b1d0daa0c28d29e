from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configs import UserError
from tasks.data.statistics import ChannelSums, LatentStatistics, statistics_hash
from tasks.data.tensors import WRITE_OPTIONS, latent_table, tensor_array, tensor_field, tensor_shape, to_numpy


def _latents(rows: int, channels: int = 3, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(rows).normal(size=(rows, channels, 4, 4)) + shift).astype(np.float16)


def test_a_tensor_column_survives_parquet_bitwise() -> None:
    tensors = {"z": _latents(100), "f": _latents(100, 7)}
    table = latent_table([f"k{i}" for i in range(100)], np.arange(100), tensors)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=32, **WRITE_OPTIONS)
    back = pq.read_table(pa.BufferReader(sink.getvalue()))
    for name, values in tensors.items():
        assert np.array_equal(to_numpy(back[name], back.schema.field(name)), values)
        assert tensor_shape(back.schema.field(name)) == values.shape[1:]


def test_a_slice_of_a_column_is_its_rows() -> None:
    values = _latents(10)
    column, field = tensor_array(values), tensor_field("z", values.shape[1:])
    assert np.array_equal(to_numpy(column.slice(3, 4), field), values[3:7])
    assert to_numpy(pa.chunked_array([], field.type), field).shape == (0, 3, 4, 4)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"'z' is fixed_size_binary\[8\]"):
        tensor_shape(tensor_field("z", (3, 4, 4)).with_type(pa.binary(8)))
    with pytest.raises(UserError, match="no shape in its metadata"):
        tensor_shape(pa.field("z", pa.binary(8)))


def test_merged_statistics_equal_numpys_over_all_rows() -> None:
    parts = [_latents(rows, shift=shift) for rows, shift in ((1000, 3.0), (1, -50.0), (317, 0.0))]
    found = ChannelSums.merged(ChannelSums.of(part) for part in parts).mean_and_std()
    everything = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(found["mean"], everything.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["std"], everything.std(axis=(0, 2, 3)), rtol=1e-12)
    assert found["count"] == everything.size // 3


def test_normalise_and_back_for_numpy_and_torch() -> None:
    z, s = _latents(500, 3, 5.0), _latents(500, 2)
    values = {"z": ChannelSums.of(z).mean_and_std(), "s": ChannelSums.of(s).mean_and_std()}
    statistics = LatentStatistics.from_facts({"statistics": values, "statistics_hash": statistics_hash(values)})
    x = np.concatenate([z, s], axis=1)
    normal = statistics.normalise(x)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean(axis=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(normal.std(axis=(0, 2, 3)), 1, atol=1e-4)
    assert torch.equal(statistics.normalise(torch.from_numpy(x)), torch.from_numpy(normal))
    np.testing.assert_allclose(statistics.denormalise(normal), x, atol=2e-3)
    texture = statistics.denormalise(normal[:, :3], columns=("z",))
    np.testing.assert_allclose(texture, z, atol=2e-3)
    with pytest.raises(ValueError, match="3 channels, their statistics 5"):
        statistics.normalise(z)


def test_changed_statistics_are_refused() -> None:
    values = {"z": ChannelSums.of(_latents(50)).mean_and_std()}
    facts = {"statistics": values, "statistics_hash": statistics_hash(values)}
    statistics = LatentStatistics.from_facts(facts)
    statistics.check(facts["statistics_hash"], "a checkpoint")
    with pytest.raises(UserError, match="a checkpoint was made for latents with statistics other"):
        statistics.check("other", "a checkpoint")
    values["z"]["mean"][0] += 1e-9
    with pytest.raises(UserError, match="changed"):
        LatentStatistics.from_facts(facts)
    with pytest.raises(UserError, match="no latent statistics"):
        LatentStatistics.from_facts({})
