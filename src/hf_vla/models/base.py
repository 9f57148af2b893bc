"""What the model families share: loading that never serves a re-initialised weight."""

from transformers.modeling_utils import PreTrainedModel


class VLAPreTrainedModel(PreTrainedModel):
    """`PreTrainedModel` whose `from_pretrained` raises where transformers only warns."""

    # The loss is a mean over the batch: scaling it by the number of items in a step would be wrong.
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """Load a checkpoint; arguments and result are those of [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: the checkpoint lacks weights of the model, or holds them in another shape.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
        if wrong:
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} lacks {len(wrong)} weights of {cls.__name__}, "
                f"or has them in another shape, among them {wrong[:5]}; they would be random. Does config.json belong "
                "to it?"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *, save_original_format=False, **kwargs):
        """Save in the layout of the model's own parameter names, which the Trainer reads back when it resumes.

        Arguments are those of [`~transformers.PreTrainedModel.save_pretrained`], which would write the names that
        older versions of transformers gave to the backbones' parameters.
        """
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)
