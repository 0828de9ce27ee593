"""The model card says what the model is, what it saw and how to use it."""

from small_models import small_config

from pipeline.card import model_card


def test_the_card_names_task_data_stages_and_use():
    meta = {
        "weights": "ema",
        "stages": {"align": {"steps": 7, "data": "a" * 64, "settings": {"global_batch": 3, "lr": 1e-6}}},
    }
    card = model_card(small_config("sr"), meta, data="photos of cats", licence="CC BY 4.0")
    for text in (
        "super-resolution from 8 pixels",
        "photos of cats",
        "weights: ema",
        "align: 7 steps of 3 samples, learning rate 1e-06",
        "CC BY 4.0",
        "model.upscale(",
    ):
        assert text in card
    assert "model.generate(" not in card
    assert "model.generate(" in model_card(small_config(), {})
