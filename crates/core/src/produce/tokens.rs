//! `token-producer`: how does a prompt become tokens, and how many does a picture take where they
//! are estimated?

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::{GoDuration, Ignored};
use crate::stage::Plugin;

/// Parameters of `token-producer`. kvroute tokenizes in its own process whenever it is given the
/// model's tokenizer, and estimates otherwise; a `vllm` section says that exact tokens are wanted,
/// its address is not called.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Tokens {
    /// The model whose tokenizer is meant.
    pub model_name: Option<String>,
    /// Exact tokens, which llm-d asks a render server for.
    pub vllm: Option<VllmRender>,
    /// Estimated tokens.
    pub estimate: Option<TokenEstimate>,
    /// Deprecated and without effect.
    pub uds_tokenizer_config: Option<Ignored>,
}

/// `vllm`, without effect beyond its presence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct VllmRender {
    /// Render server.
    pub url: Option<String>,
    /// Of one call.
    pub timeout: Option<GoDuration>,
    /// Of one call with multimodal items.
    pub mm_timeout: Option<GoDuration>,
}

/// `estimate`: tokens without a tokenizer, four bytes of text each. Pictures and sound take room
/// in them that is estimated from their size.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TokenEstimate {
    /// Tokens of images.
    pub image: ImageEstimate,
    /// Tokens of videos.
    pub video: VideoEstimate,
}

impl Tokens {
    /// Whether these parameters ask for the model's own tokens.
    pub fn wants_exact(&self) -> bool {
        self.vllm.is_some() || self.model_name.as_ref().is_some_and(|name| !name.is_empty())
    }
}

impl Plugin for Tokens {
    fn check(&self) -> Result<(), String> {
        if self.estimate.is_some() && self.wants_exact() {
            return Err("estimate cannot stand beside vllm or modelName: tokens are either \
                        estimated or the model's own"
                .to_owned());
        }
        if self.vllm.is_some() && self.model_name.as_ref().is_none_or(String::is_empty) {
            return Err("vllm needs modelName, the model whose tokens are wanted".to_owned());
        }
        Ok(())
    }

    fn inert(&self) -> Vec<String> {
        let text = "vllm: prompts are tokenized in this process, its url is not called";
        self.vllm.iter().map(|_| text.to_owned()).collect()
    }
}

/// Tokens of an audio clip, which has no parameters: 10 s at 12.5 tokens per second and 14 around
/// them, the fall-back of llm-d for clips of unknown length.
pub const AUDIO_TOKENS: u32 = 139;

/// Width and height that stand for a picture whose own are not known.
const DEFAULT_PIXELS: (u32, u32) = (640, 360);
/// Pixels for which a token is counted.
const DEFAULT_FACTOR: u32 = 1024;
const DEFAULT_DURATION_S: f64 = 10.0;
const DEFAULT_SAMPLE_FPS: f64 = 1.0;
const DEFAULT_SOURCE_FPS: f64 = 24.0;

/// `estimate.image`: placeholder tokens of one image.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ImageEstimate {
    /// `dynamic`: width x height / factor; `static`: the same number for each image.
    pub mode: CountMode,
    /// Size of an image whose own cannot be read: it is given as a URL, or is of an unknown format.
    pub default_resolution: Resolution,
    /// For mode `dynamic`.
    pub dynamic: PixelFactor,
    /// For mode `static`.
    #[serde(rename = "static")]
    pub fixed: StaticImage,
}

/// How the tokens of a picture are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum CountMode {
    /// By its pixels.
    #[default]
    Dynamic,
    /// A constant.
    Static,
}

/// Size of a picture in pixels; 0 counts as the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Resolution {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

impl Default for Resolution {
    fn default() -> Resolution {
        Resolution { width: DEFAULT_PIXELS.0, height: DEFAULT_PIXELS.1 }
    }
}

/// Pixels per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PixelFactor {
    /// Pixels for which one token is counted; 0 counts as 1024.
    pub factor: u32,
}

impl Default for PixelFactor {
    fn default() -> PixelFactor {
        PixelFactor { factor: DEFAULT_FACTOR }
    }
}

/// `estimate.image.static`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct StaticImage {
    /// Tokens of each image, at least 1.
    pub static_token: u32,
}

/// `estimate.video`: placeholder tokens of one video, frames x tokens per frame. Videos are not
/// opened; length, size and frame rate come from request headers or from here.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct VideoEstimate {
    /// Size of a frame without the header `x-llm-d-video-resolution`.
    pub default_resolution: Resolution,
    /// Length in seconds without the header `x-llm-d-video-duration-seconds`.
    pub default_duration: f64,
    /// Tokens of each frame.
    pub tokens_per_frame: TokensPerFrame,
    /// Number of frames that the model looks at.
    pub frames: Frames,
    /// Most tokens of one video; 0: no limit.
    pub max_video_tokens: u32,
}

impl Default for VideoEstimate {
    fn default() -> VideoEstimate {
        VideoEstimate {
            default_resolution: Resolution::default(),
            default_duration: DEFAULT_DURATION_S,
            tokens_per_frame: TokensPerFrame::default(),
            frames: Frames::default(),
            max_video_tokens: 0,
        }
    }
}

/// `estimate.video.tokensPerFrame`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TokensPerFrame {
    /// `dynamic`: width x height / factor; `static`: the same number for each frame.
    pub mode: CountMode,
    /// For mode `dynamic`.
    pub dynamic: PixelFactor,
    /// For mode `static`.
    #[serde(rename = "static")]
    pub fixed: StaticFrame,
}

/// `estimate.video.tokensPerFrame.static`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct StaticFrame {
    /// Tokens of each frame, at least 1.
    pub num_tokens_per_frame: u32,
}

/// `estimate.video.frames`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Frames {
    /// `sampled`: duration x sampleFPS; `strided`: every n-th frame of the source.
    pub mode: FramesMode,
    /// Fewest frames; 0: no limit.
    pub min_frames: u32,
    /// Most frames; 0: no limit.
    pub max_frames: u32,
    /// For mode `sampled`.
    pub sampled: SampledFrames,
    /// For mode `strided`.
    pub strided: StridedFrames,
}

/// How the frames of a video are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum FramesMode {
    /// At a rate of the model's own.
    #[default]
    Sampled,
    /// Every n-th frame of the source.
    Strided,
}

/// `estimate.video.frames.sampled`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SampledFrames {
    /// Frames per second that the model looks at.
    #[serde(rename = "sampleFPS")]
    pub sample_fps: f64,
    /// Frames that the model merges into one; below 2: none are.
    pub temporal_patch_size: u32,
}

impl Default for SampledFrames {
    fn default() -> SampledFrames {
        SampledFrames { sample_fps: DEFAULT_SAMPLE_FPS, temporal_patch_size: 0 }
    }
}

/// `estimate.video.frames.strided`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct StridedFrames {
    /// Frames per second of the source without the header `x-llm-d-video-fps`.
    #[serde(rename = "defaultSourceFPS")]
    pub default_source_fps: f64,
    /// Every how many frames one is taken, at least 1.
    pub frame_stride: u32,
}

impl Default for StridedFrames {
    fn default() -> StridedFrames {
        StridedFrames { default_source_fps: DEFAULT_SOURCE_FPS, frame_stride: 1 }
    }
}

/// What a request's headers say about its videos.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct VideoHints {
    /// Frames per second of the source.
    pub fps: Option<f64>,
    /// Length in seconds.
    pub duration_s: Option<f64>,
    /// Width and height of a frame in pixels.
    pub pixels: Option<(u32, u32)>,
}

impl VideoHints {
    /// Reads the headers `x-llm-d-video-*`, whose values `header` gives by name in lower case. A
    /// value that makes no sense counts as absent.
    pub fn read<'a>(header: impl Fn(&'static str) -> Option<&'a str>) -> VideoHints {
        let number = |name| header(name)?.trim().parse().ok().filter(|value| is_positive(*value));
        VideoHints {
            fps: number("x-llm-d-video-fps"),
            duration_s: number("x-llm-d-video-duration-seconds"),
            pixels: header("x-llm-d-video-resolution").and_then(parse_pixels),
        }
    }
}

/// `WIDTHxHEIGHT`.
fn parse_pixels(text: &str) -> Option<(u32, u32)> {
    let (width, height) = text.split_once(['x', 'X'])?;
    let side = |text: &str| text.trim().parse().ok().filter(|side: &u32| *side > 0);
    Some((side(width)?, side(height)?))
}

fn is_positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

fn or_default(value: f64, default: f64) -> f64 {
    if is_positive(value) { value } else { default }
}

/// At least 1 token for any picture, so that each one weighs something.
fn by_pixels(width: u32, height: u32, factor: u32) -> u32 {
    let side = |given: u32, default: u32| u64::from(if given == 0 { default } else { given });
    let pixels = side(width, DEFAULT_PIXELS.0) * side(height, DEFAULT_PIXELS.1);
    let tokens = pixels / side(factor, DEFAULT_FACTOR);
    u32::try_from(tokens).unwrap_or(u32::MAX).max(1)
}

impl ImageEstimate {
    /// Tokens of an image of these pixels, `None` where they are not known.
    pub fn tokens(&self, pixels: Option<(u32, u32)>) -> u32 {
        let default = (self.default_resolution.width, self.default_resolution.height);
        let (width, height) = pixels.unwrap_or(default);
        match self.mode {
            CountMode::Static => self.fixed.static_token.max(1),
            CountMode::Dynamic => by_pixels(width, height, self.dynamic.factor),
        }
    }
}

impl VideoEstimate {
    /// Tokens of a video of which the headers say `hints`.
    pub fn tokens(&self, hints: &VideoHints) -> u32 {
        let frames = self.frame_count(hints);
        let tokens = frames.saturating_mul(u64::from(self.frame_tokens(hints)));
        let most = if self.max_video_tokens == 0 { u32::MAX } else { self.max_video_tokens };
        u32::try_from(tokens).unwrap_or(u32::MAX).min(most).max(1)
    }

    fn frame_tokens(&self, hints: &VideoHints) -> u32 {
        let default = (self.default_resolution.width, self.default_resolution.height);
        let (width, height) = hints.pixels.unwrap_or(default);
        match self.tokens_per_frame.mode {
            CountMode::Static => self.tokens_per_frame.fixed.num_tokens_per_frame.max(1),
            CountMode::Dynamic => by_pixels(width, height, self.tokens_per_frame.dynamic.factor),
        }
    }

    /// The limits hold before frames are merged.
    fn frame_count(&self, hints: &VideoHints) -> u64 {
        let Frames { mode, min_frames, max_frames, sampled, strided } = &self.frames;
        let default_s = or_default(self.default_duration, DEFAULT_DURATION_S);
        let duration_s = hints.duration_s.unwrap_or(default_s);
        let most = if *max_frames == 0 { u64::MAX } else { u64::from(*max_frames) };
        let limited = |frames: u64| frames.max(u64::from(*min_frames)).min(most);
        match mode {
            FramesMode::Sampled => {
                let fps = or_default(sampled.sample_fps, DEFAULT_SAMPLE_FPS);
                limited((duration_s * fps) as u64) / u64::from(sampled.temporal_patch_size.max(1))
            }
            FramesMode::Strided => {
                let default_fps = or_default(strided.default_source_fps, DEFAULT_SOURCE_FPS);
                let fps = hints.fps.unwrap_or(default_fps);
                limited((duration_s * fps) as u64 / u64::from(strided.frame_stride.max(1)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(yaml: &str) -> TokenEstimate {
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn images() {
        let small = Some((1, 1));
        let table = [
            ("{}", None, 225),
            ("{}", Some((1024, 1024)), 1024),
            ("{}", small, 1),
            ("{}", Some((u32::MAX, u32::MAX)), u32::MAX),
            ("image: {mode: static, static: {staticToken: 280}}", Some((64, 64)), 280),
            ("image: {mode: static}", None, 1),
            ("image: {mode: dynamic, dynamic: {factor: 512}}", None, 450),
            ("image: {dynamic: {factor: 0}}", None, 225),
            ("image: {defaultResolution: {width: 2048, height: 1024}}", None, 2048),
            ("image: {defaultResolution: {width: 2048, height: 1024}}", Some((32, 32)), 1),
            ("image: {defaultResolution: {width: 0}}", None, 225),
        ];
        for (yaml, pixels, tokens) in table {
            assert_eq!(estimate(yaml).image.tokens(pixels), tokens, "{yaml} {pixels:?}");
        }
    }

    #[test]
    fn videos() {
        let qwen = "video: {frames: {sampled: {sampleFPS: 2, temporalPatchSize: 2}, minFrames: 4, \
                    maxFrames: 768}, maxVideoTokens: 12288}";
        let gemma = "video: {tokensPerFrame: {mode: static, static: {numTokensPerFrame: 296}}, \
                     frames: {mode: strided, minFrames: 1, maxFrames: 8, \
                     strided: {frameStride: 4}}}";
        let none = VideoHints::default();
        let long = VideoHints { duration_s: Some(3600.0), ..none };
        let short = VideoHints { duration_s: Some(0.5), ..none };
        let slow = VideoHints { fps: Some(1.0), ..none };
        let wide = VideoHints { pixels: Some((1024, 1024)), ..none };
        let table = [
            ("{}", none, 10 * 225),
            ("{}", short, 1),
            ("{}", slow, 10 * 225),
            ("{}", wide, 10 * 1024),
            ("video: {frames: {mode: strided}}", none, 240 * 225),
            ("video: {frames: {mode: strided}}", slow, 10 * 225),
            ("video: {defaultDuration: 20}", none, 20 * 225),
            ("video: {defaultDuration: -1}", none, 10 * 225),
            ("video: {defaultDuration: .nan}", none, 10 * 225),
            ("video: {maxVideoTokens: 100}", none, 100),
            ("video: {tokensPerFrame: {dynamic: {factor: 2048}}}", none, 10 * 112),
            (qwen, none, 10 * 225),
            (qwen, short, 2 * 225),
            (qwen, long, 12288),
            (gemma, none, 8 * 296),
            (gemma, VideoHints { duration_s: Some(0.1), ..none }, 296),
        ];
        for (yaml, hints, tokens) in table {
            assert_eq!(estimate(yaml).video.tokens(&hints), tokens, "{yaml} {hints:?}");
        }
        let endless = VideoHints { duration_s: Some(1e300), fps: Some(1e300), pixels: None };
        assert_eq!(estimate("{}").video.tokens(&endless), u32::MAX);
    }

    #[test]
    fn exact_and_estimated_tokens_exclude_each_other() {
        let table = [
            ("{}", false, None),
            ("estimate: {}", false, None),
            ("modelName: m", true, None),
            ("{modelName: m, vllm: {}}", true, None),
            ("vllm: {}", true, Some("vllm needs modelName")),
            ("{modelName: '', vllm: {}}", true, Some("vllm needs modelName")),
            ("{modelName: m, estimate: {}}", true, Some("estimate cannot")),
            ("{modelName: m, vllm: {}, estimate: {}}", true, Some("estimate cannot")),
        ];
        for (yaml, exact, error) in table {
            let tokens: Tokens = serde_saphyr::from_str(yaml).unwrap();
            assert_eq!(tokens.wants_exact(), exact, "{yaml}");
            match (tokens.check(), error) {
                (Ok(()), None) => {}
                (Err(found), Some(start)) => assert!(found.starts_with(start), "{yaml}: {found}"),
                (found, _) => panic!("{yaml}: {found:?}"),
            }
        }
    }

    #[test]
    fn unknown_fields_and_modes_are_errors() {
        for yaml in [
            "picture: {}",
            "image: {mode: guess}",
            "image: {factor: 3}",
            "image: {dynamic: {factor: -1}}",
            "video: {frames: {mode: dynamic}}",
            "video: {frames: {sampled: {sampleFps: 2}}}",
        ] {
            assert!(serde_saphyr::from_str::<TokenEstimate>(yaml).is_err(), "{yaml}");
        }
    }

    #[test]
    fn hints_of_headers() {
        let table = [
            (["30", "12.5", "1280x720"], (Some(30.0), Some(12.5), Some((1280, 720)))),
            ([" 30 ", "1e1", " 1 X 2 "], (Some(30.0), Some(10.0), Some((1, 2)))),
            (["-1", "0", "0x7"], (None, None, None)),
            (["inf", "NaN", "7"], (None, None, None)),
            (["", "x", "x"], (None, None, None)),
            (["fast", "long", "1x2x3"], (None, None, None)),
        ];
        for ([fps, duration, pixels], expected) in table {
            let hints = VideoHints::read(|name| match name {
                "x-llm-d-video-fps" => Some(fps),
                "x-llm-d-video-duration-seconds" => Some(duration),
                "x-llm-d-video-resolution" => Some(pixels),
                _ => None,
            });
            assert_eq!((hints.fps, hints.duration_s, hints.pixels), expected);
        }
        assert_eq!(VideoHints::read(|_| None), VideoHints::default());
    }
}
