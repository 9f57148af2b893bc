"""A checkpoint as a controller: an observation goes in, one action comes out."""

from collections import deque

import numpy as np
import torch

from hf_vla.actions.chunking import RecedingHorizon, TemporalEnsembler
from hf_vla.actions.spec import whole_number
from hf_vla.models.images import to_rgb
from hf_vla.models.loading import load_checkpoint
from hf_vla.models.requests import Request, answer

IMAGES = "observation.images."
DEPTH = "observation.depth."
STATE = "observation.state"
TASK = "task"


class Policy:
    """Runs a model and its processor at every control step.

    The model predicts a chunk of actions. By default `n_action_steps` of it are executed before the next prediction;
    with `ensemble_coefficient` every step predicts, and all predictions made for it are averaged.

    A model that reasons in words does so before every prediction, which takes much of the time; with
    `reasoning_interval` it acts several times under what it said. `policy.reasoning` is the text under which the last
    prediction was made; None before the first, and for models that act without words.

    A checkpoint that sees several observations (`n_obs_steps` above 1) gets those of the last control steps, which the
    policy keeps: those of every call of `select_action` and `predict_chunk` since `reset`, under one instruction.
    Before them there is nothing, as where an episode begins in training.

    ```python
    policy = Policy.from_pretrained("outputs/demo/model")
    policy.reset()
    action = policy.select_action({"observation.images.front": image, "task": "pick up the red cube"})
    ```

    Args:
        model ([`~transformers.PreTrainedModel`]): any family of this library.
        processor ([`~transformers.ProcessorMixin`]): of the same checkpoint.
        unnorm_key (`str`, *optional*): dataset whose robot is driven; may be left out where there is only one.
        n_action_steps (`int`, *optional*): actions executed per chunk, 1 to the chunk size; default the whole chunk.
        ensemble_coefficient (`float`, *optional*): see [`~hf_vla.actions.chunking.TemporalEnsembler`]; 0.01 is usual.
        seed (`int`, *optional*): makes heads that draw noise repeatable: every episode, from `reset` on, draws the
            same.
        num_inference_steps (`int`, *optional*): of heads that denoise; the checkpoint's own by default.
        reasoning_interval (`int`, defaults to 1): predictions made under one reasoning, the first of them included.
        max_reasoning_tokens (`int`, *optional*): of the model's own reasoning, with its end; the checkpoint's by
            default. 0: act without words.

    Raises:
        ValueError: the processor knows no actions, the key is unknown or missing, both ways of executing a chunk are
            asked for, or a reasoning's interval or length of a model that acts without words.
    """

    def __init__(
        self,
        model,
        processor,
        unnorm_key=None,
        n_action_steps=None,
        ensemble_coefficient=None,
        seed=None,
        num_inference_steps=None,
        reasoning_interval=1,
        max_reasoning_tokens=None,
    ):
        if not hasattr(processor, "action_codec"):
            raise ValueError(
                f"Expected the processor of a hf_vla family, came {type(processor).__name__}: the checkpoint is of "
                "another family, or was saved without its processor."
            )
        if n_action_steps is not None and ensemble_coefficient is not None:
            raise ValueError(
                "Give n_action_steps or ensemble_coefficient, not both: ensembling predicts at every step."
            )
        self.model, self.processor = model.eval(), processor
        self.takes_reasoning = getattr(processor, "takes_reasoning", False) and model.config.max_reasoning_tokens > 0
        self._reasoning_interval = whole_number(reasoning_interval, "reasoning_interval")
        self._reasoning_options = {}
        if max_reasoning_tokens is not None:
            self._check_words("max_reasoning_tokens", max_reasoning_tokens)
            limit = whole_number(max_reasoning_tokens, "max_reasoning_tokens", least=0)
            self._reasoning_options["max_reasoning_tokens"] = limit
        if self._reasoning_interval > 1:
            self._check_words("reasoning_interval", reasoning_interval)
        codec = processor.action_codec
        self.unnorm_key = codec.resolve_key(unnorm_key)
        self.action_spec, self.state_spec = codec.specs(self.unnorm_key)
        self.cameras = processor.camera_specs(self.unnorm_key)
        steps = codec.chunk_size if n_action_steps is None else n_action_steps
        if steps > codec.chunk_size:
            raise ValueError(f"Expected n_action_steps of at most the chunk size {codec.chunk_size}, came {steps}.")
        self._horizon = RecedingHorizon(steps)
        self._ensembler = None if ensemble_coefficient is None else TemporalEnsembler(ensemble_coefficient)
        self.takes_state = codec.takes_state
        self._past = deque(maxlen=codec.n_obs_steps - 1)  # what the processor needs of earlier observations
        self._options = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
        self._seed = seed
        if seed is not None:
            self._options["generator"] = torch.Generator(model.device)
        self.reset()

    @classmethod
    def from_pretrained(cls, path, unnorm_key=None, device=None, revision=None, token=None, **options):
        """Load a checkpoint as a policy.

        Args:
            path (`str`): folder or Hub name.
            device (`str` or `torch.device`, *optional*): default the accelerator where there is one, else the CPU.
            revision (`str`, *optional*): branch, tag or commit on the Hub.
            token (`str`, *optional*): for what is private on the Hub; by default HF_TOKEN, or that of `hf auth login`.
            unnorm_key, options: see the class.

        Returns:
            `Policy`

        Raises:
            ValueError: see the class.
            OSError: there is no checkpoint, or the Hub refuses it; the text says why.
        """
        model, processor = load_checkpoint(path, revision=revision, token=token)
        try:
            model.to(device or torch.accelerator.current_accelerator() or "cpu")
        except (RuntimeError, AssertionError) as error:  # torch's own words, of both kinds
            raise ValueError(f"Cannot use the device {device!r}: {error}") from error
        return cls(model, processor, unnorm_key, **options)

    def reset(self):
        """Forget observations, predictions and reasoning and draw from the seed anew, as an episode starts."""
        self._past.clear()
        self._restart()

    def _restart(self):
        self._forget()
        self._task = None
        if self._seed is not None:
            self._options["generator"].manual_seed(self._seed)

    def _forget(self):
        self.reasoning = self._given = None
        self._said, self._due = None, 0  # task and ids of the model's last reasoning; predictions still due under it
        self._horizon.reset()
        if self._ensembler is not None:
            self._ensembler.reset()

    def predict_chunk(self, observation, reasoning=None):
        """Predict the next actions; keeps observation, reasoning and the place among the seed's numbers, no actions.

        Args:
            observation (`dict`): `observation.images.<camera>` (H, W, 3) uint8 (or whatever the processor takes) of
                every camera that the checkpoint declares. None where one of several is missing: a family of several
                cameras masks it, which its network knows only if pictures were missing in training. Also `task`, and
                what the checkpoint declares of `observation.state` (S,) and `observation.depth.<camera>`
                (H, W) in metres. Other entries are ignored, a dataset's reasoning among them.
            reasoning (`str`, *optional*): to act under, such as a planner's, instead of one of the model's own; after
                it, the model reasons anew.

        Returns:
            `np.ndarray` of shape `(chunk_size, action_dim)`: float32, robot units.

        Raises:
            ValueError: the observation lacks something that the checkpoint needs, which the text names, or the model
                acts without words. Such a call counts for nothing.
        """
        return predict_chunks([self], [observation], [reasoning])[0]

    def check(self, observation, reasoning=None):
        """Raise where `predict_chunk` would for want of something in the observation; keeps nothing.

        Args:
            observation (`dict`), reasoning (`str`, *optional*): see `predict_chunk`.
        """
        self._inputs(observation, reasoning)

    def execute(self, chunk):
        """Say which actions a prediction leads to, for whoever predicts for several policies at once.

        Args:
            chunk (`np.ndarray` of shape `(chunk_size, action_dim)`): what was predicted last.

        Returns:
            `np.ndarray` of shape `(n_action_steps, action_dim)`: to be executed before the next prediction; one action
            with ensembling.
        """
        if self._ensembler is not None:
            return self._ensembler.update(chunk)[None]
        return chunk[: self.n_action_steps]

    def remember(self, observation):
        """Keep what was seen at a control step without a prediction, of which a model of several observations learns.

        Args:
            observation (`dict`): see `predict_chunk`.

        Raises:
            ValueError: see `predict_chunk`.
        """
        self._remember(self._inputs(observation, None))

    @property
    def n_action_steps(self):
        """Actions executed per prediction."""
        return 1 if self._ensembler is not None else self._horizon.n_action_steps

    @property
    def looks_at_every_step(self):
        """Whether it needs the observation of every control step, not of those alone at which it predicts."""
        return self._ensembler is not None or self._past.maxlen > 0

    def select_action(self, observation, reasoning=None):
        """Return the action for this control step.

        A new chunk is predicted when one is due. Another task than before starts all anew; another given reasoning
        ends the chunk, and the seed's random numbers go on.

        Args:
            observation (`dict`), reasoning (`str`, *optional*): see `predict_chunk`.

        Returns:
            `np.ndarray` of shape `(action_dim,)`: float32, robot units.

        Raises:
            ValueError: see `predict_chunk`.
        """
        seen = self._inputs(observation, reasoning)  # checked at every step, also while a chunk is being executed
        if observation[TASK] != self._task:
            self._restart()
        elif reasoning != self._given:
            self._forget()
        self._task, self._given = observation[TASK], reasoning
        if self._ensembler is not None:
            return self._ensembler.update(self.predict_chunk(observation, reasoning))
        if self._horizon.empty:
            self._horizon.push(self.predict_chunk(observation, reasoning))
        else:
            self._remember(seen)
        return self._horizon.pop()

    def request(self, observation, reasoning=None):
        """What the model is to be asked for; raises all that is an observation's fault. See `check`, keeps nothing."""
        seen, options = self._inputs(observation, reasoning), dict(self._options)
        recalls = self._recalls(observation, reasoning)
        if recalls:
            options["reasoning_ids"] = self._said[1]
        elif reasoning is None:
            options |= self._reasoning_options
        inputs = self.processor(**self._with_past(seen), unnorm_key=self.unnorm_key, return_tensors="pt")
        talks = self.talks(observation, reasoning)
        return Request(self.model, self.processor, self.unnorm_key, inputs, options, talks)

    def talks(self, observation, reasoning=None):
        """Whether the next prediction is made after words of the model's own; it shares no batch then."""
        return self._speaks and reasoning is None and not self._recalls(observation, reasoning)

    def _recalls(self, observation, reasoning):
        """Whether the next prediction is made under what the model said before."""
        return reasoning is None and self._due > 0 and self._said[0] == observation[TASK]

    def _settle(self, observation, reasoning, output):
        """Keep what a prediction leaves behind."""
        if self._past.maxlen:  # else nothing is kept, and to check the observation once more takes time
            self.remember(observation)
        if reasoning is not None:
            self.reasoning, self._due = reasoning.strip(), 0  # as the processor strips it
        elif self._recalls(observation, reasoning):
            self._due -= 1
        elif self._speaks:
            (self.reasoning,) = self.processor.decode_reasoning(output)
            self._said = observation[TASK], output.reasoning_ids
            self._due = self._reasoning_interval - 1

    @property
    def _speaks(self):
        return self.takes_reasoning and self._reasoning_options.get("max_reasoning_tokens") != 0

    def _check_words(self, name, value):
        """Raise where an option has no use: nothing is said."""
        if not self.takes_reasoning:
            why = "does not reason"
            if getattr(self.processor, "takes_reasoning", False):
                why = "was trained to act without words (config.max_reasoning_tokens is 0)"
            raise ValueError(f"This model {why}: leave {name} out, came {value!r}.")
        if not self._speaks:
            raise ValueError(
                f"With max_reasoning_tokens=0 the model acts without words: leave it or {name} out, came {value!r}."
            )

    def _inputs(self, observation, reasoning):
        """What the processor needs of an observation, and of words that are given with it."""
        if not isinstance(observation.get(TASK), str):
            raise ValueError(
                f"Expected an instruction under {TASK!r}, a text, came {observation.get(TASK)!r}; the observation has "
                f"{sorted(observation)}."
            )
        images = self._pictures(observation)
        names = [*images]
        if all(picture is None for picture in images.values()):
            raise ValueError(f"This checkpoint needs a picture of {' or '.join(map(repr, names))}, came None.")
        inputs = {"images": [images if len(names) > 1 else images[names[0]]], "text": [observation[TASK]]}
        for name, camera in zip(names, self.cameras, strict=False):
            if camera.depth:
                if DEPTH + name not in observation:
                    raise ValueError(f"This checkpoint needs metric depth: give {DEPTH + name!r}, (H, W) in metres.")
                inputs["depth"] = np.asarray(observation[DEPTH + name])[None]
        if self.takes_state:
            inputs["state"] = self._state(observation)[None]
        if reasoning is not None:
            self._check_words("reasoning", reasoning)
            inputs["reasoning"] = [reasoning]
        return inputs

    def _earlier(self, seen):
        """What was seen before under the same instruction; another one starts anew."""
        return [*self._past] if self._past and self._past[-1]["text"] == seen["text"] else []

    def _remember(self, seen):
        """Keep a copy of what the processor needs: simulators draw their next picture into the same memory."""
        if self._past.maxlen == 0:
            return
        (pictures,) = seen["images"]
        if isinstance(pictures, dict):
            pictures = {name: None if picture is None else to_rgb(picture) for name, picture in pictures.items()}
        else:
            pictures = to_rgb(pictures)
        arrays = {name: seen[name].copy() for name in ("state", "depth") if name in seen}
        past = self._earlier(seen)
        self._past.clear()
        self._past.extend([*past, {"images": [pictures], "text": seen["text"], **arrays}])

    def _with_past(self, seen):
        """What the processor needs of the last observations, as the dataset has it where an episode begins."""
        if self._past.maxlen == 0:
            return seen
        steps = [*self._earlier(seen), seen]
        padding = self._past.maxlen + 1 - len(steps)
        pictures = [step["images"][0] for step in steps]
        if isinstance(pictures[-1], dict):
            images = {name: [None] * padding + [each[name] for each in pictures] for name in pictures[-1]}
        else:
            images = [None] * padding + pictures
        inputs = {**seen, "images": [images]}
        if "state" in seen:
            inputs["state"] = np.stack([steps[0]["state"][0]] * padding + [step["state"][0] for step in steps])[None]
        if "depth" in seen:
            inputs["depth"] = [[None] * padding + [step["depth"][0] for step in steps]]
        return inputs

    def _pictures(self, observation):
        """The picture of every camera, by its name."""
        declared = [camera.name for camera in self.cameras if camera.name is not None]
        given = {key.removeprefix(IMAGES): value for key, value in observation.items() if key.startswith(IMAGES)}
        given |= {name: observation[name] for name in declared if name in observation}  # such as observation.image
        missing = [name for name in declared if name not in given]
        if missing:
            raise ValueError(
                f"This checkpoint needs the camera{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}; the "
                f"observation has {sorted(given)}."
            )
        if not declared and len(given) != 1:
            raise ValueError(
                f"This checkpoint names no camera, so give exactly one '{IMAGES}<name>'; came {sorted(given)}."
            )
        return {name: given[name] for name in declared or given}

    def _state(self, observation):
        state_dim = self.processor.action_codec.state_normalizer(self.unnorm_key).action_dim
        names = "" if self.state_spec is None else f" {list(self.state_spec.names)}"
        if STATE not in observation:
            raise ValueError(f"This checkpoint needs the robot's state: give {STATE!r}, {state_dim} numbers{names}.")
        state = np.asarray(observation[STATE], np.float32)
        if state.shape != (state_dim,) or not np.isfinite(state).all():
            raise ValueError(f"Expected {state_dim} finite numbers{names} in {STATE!r}, came {state.tolist()}.")
        return state


def predict_chunks(policies, observations, reasonings=None, batch_size=None):
    """Predict for several policies, those of one model in one batch where their prompts are alike.

    Args:
        policies (`list[Policy]`): each of an episode of its own.
        observations (`list[dict]`), reasonings (`list[str | None]`, *optional*): see `Policy.predict_chunk`.
        batch_size (`int`, *optional*): what makes a prediction independent of who shares its batch, see
            [`~hf_vla.models.requests.answer`]. Default: as many as there are.

    Returns:
        `list[np.ndarray]` of `(chunk_size, action_dim)`: float32, robot units; see `Policy.execute`.

    Raises:
        ValueError: see `Policy.predict_chunk`; the call counts for nothing then.
    """
    reasonings = [None] * len(policies) if reasonings is None else reasonings
    turns = list(zip(policies, observations, reasonings, strict=True))
    answers = answer([policy.request(seen, words) for policy, seen, words in turns], batch_size)
    for (policy, seen, words), (_, output) in zip(turns, answers, strict=True):
        policy._settle(seen, words, output)
    return [chunk for chunk, _ in answers]
