"""The papers of the objectives, as cards cite them."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A method's paper: `arxiv` is its identifier."""

    title: str
    authors: str  # BibTeX's form
    year: int
    arxiv: str

    def bibtex(self, key: str) -> str:
        return (
            f"@misc{{{key},\n  title = {{{self.title}}},\n  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n"
            "  archivePrefix = {arXiv}\n}"
        )


# By the objective's name in a recipe.
PAPERS = {
    "add": Paper(
        "Adversarial Diffusion Distillation",
        "Sauer, Axel and Lorenz, Dominik and Blattmann, Andreas and Rombach, Robin",
        2023,
        "2311.17042",
    ),
    "anyflow": Paper(
        "AnyFlow: Any-Step Video Diffusion Model with On-Policy Flow Map Distillation",
        "Gu, Yuchao and Fang, Guian and Jiang, Yuxin and Mao, Weijia and Han, Song and Cai, Han "
        "and Shou, Mike Zheng",
        2026,
        "2605.13724",
    ),
    "ayf": Paper(
        "Align Your Flow: Scaling Continuous-Time Flow Map Distillation",
        "Sabour, Amirmojtaba and Fidler, Sanja and Kreis, Karsten",
        2025,
        "2506.14603",
    ),
    "cmt": Paper(
        "CMT: Mid-Training for Efficient Learning of Consistency, Mean Flow, and Flow Map Models",
        "Hu, Zheyuan and Lai, Chieh-Hsin and Mitsufuji, Yuki and Ermon, Stefano",
        2025,
        "2509.24526",
    ),
    "compress": Paper(
        "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion",
        "Kim, Bo-Kyeong and Song, Hyoung-Kyu and Castells, Thibault and Choi, Shinkook",
        2023,
        "2305.15798",
    ),
    "consistency": Paper(
        "Consistency Models",
        "Song, Yang and Dhariwal, Prafulla and Chen, Mark and Sutskever, Ilya",
        2023,
        "2303.01469",
    ),
    "ct": Paper(
        "Improved Techniques for Training Consistency Models",
        "Song, Yang and Dhariwal, Prafulla",
        2023,
        "2310.14189",
    ),
    "ctm": Paper(
        "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion",
        "Kim, Dongjun and Lai, Chieh-Hsin and Liao, Wei-Hsiang and Murata, Naoki and Takida, Yuhta "
        "and Uesaka, Toshimitsu and He, Yutong and Mitsufuji, Yuki and Ermon, Stefano",
        2024,
        "2310.02279",
    ),
    "ddo": Paper(
        "Direct Discriminative Optimization: Your Likelihood-Based Visual Generative Model is "
        "Secretly a GAN Discriminator",
        "Zheng, Kaiwen and Chen, Yongxin and Chen, Huayu and He, Guande and Liu, Ming-Yu and Zhu, "
        "Jun and Zhang, Qinsheng",
        2025,
        "2503.01103",
    ),
    "diff-instruct": Paper(
        "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained "
        "Diffusion Models",
        "Luo, Weijian and Hu, Tianyang and Zhang, Shifeng and Sun, Jiacheng and Li, Zhenguo and "
        "Zhang, Zhihua",
        2023,
        "2305.18455",
    ),
    "diffusion": Paper(
        "Elucidating the Design Space of Diffusion-Based Generative Models",
        "Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli",
        2022,
        "2206.00364",
    ),
    "decoder": Paper(
        "SnapFusion: Text-to-Image Diffusion Model on Mobile Devices within Two Seconds",
        "Li, Yanyu and Wang, Huan and Jin, Qing and Hu, Ju and Chemerys, Pavlo and Fu, Yun and "
        "Wang, Yanzhi and Tulyakov, Sergey and Ren, Jian",
        2023,
        "2306.00980",
    ),
    "guide": Paper(
        "Plug-and-Play Diffusion Distillation",
        "Hsiao, Yi-Ting and Khodadadeh, Siavash and Duarte, Kevin and Lin, Wei-An and Qu, Hui and "
        "Kwon, Mingi and Kalarot, Ratheesh",
        2024,
        "2406.01954",
    ),
    "discriminator": Paper(
        "Refining Generative Process with Discriminator Guidance in Score-based Diffusion Models",
        "Kim, Dongjun and Kim, Yeongmin and Kwon, Se Jung and Kang, Wanmo and Moon, Il-Chul",
        2022,
        "2211.17091",
    ),
    "dmd": Paper(
        "One-step Diffusion with Distribution Matching Distillation",
        'Yin, Tianwei and Gharbi, Micha{\\"e}l and Zhang, Richard and Shechtman, Eli and '
        "Durand, Fr{\\'e}do and Freeman, William T. and Park, Taesung",
        2023,
        "2311.18828",
    ),
    "dmd2": Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis",
        'Yin, Tianwei and Gharbi, Micha{\\"e}l and Park, Taesung and Zhang, Richard and '
        "Shechtman, Eli and Durand, Fr{\\'e}do and Freeman, William T.",
        2024,
        "2405.14867",
    ),
    "dmd2-anchored": Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis",
        'Yin, Tianwei and Gharbi, Micha{\\"e}l and Park, Taesung and Zhang, Richard and '
        "Shechtman, Eli and Durand, Fr{\\'e}do and Freeman, William T.",
        2024,
        "2405.14867",
    ),
    "draft": Paper(
        "Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
        "Clark, Kevin and Vicol, Paul and Swersky, Kevin and Fleet, David J.",
        2023,
        "2309.17400",
    ),
    "drift": Paper(
        "Teacher-Feature Drifting: One-Step Diffusion Distillation with Pretrained Diffusion "
        "Representations",
        "Zhang, Yuan and Li, Chenyi and Ma, Guoqing and Zha, Jiajun and Yang, Yuanming and Wang, "
        "Bo and Tang, Wei and Li, Wenbo and Huang, Haoyang and Duan, Nan",
        2026,
        "2605.07327",
    ),
    "ecodiff": Paper(
        "Effortless Efficiency: Low-Cost Pruning of Diffusion Models",
        "Zhang, Yang and Jin, Er and Dong, Yanfei and Khakzar, Ashkan and Torr, Philip and "
        "Stegmaier, Johannes and Kawaguchi, Kenji",
        2024,
        "2412.02852",
    ),
    "dsno": Paper(
        "Fast Sampling of Diffusion Models via Operator Learning",
        "Zheng, Hongkai and Nie, Weili and Vahdat, Arash and Azizzadenesheli, Kamyar and "
        "Anandkumar, Anima",
        2022,
        "2211.13449",
    ),
    "ect": Paper(
        "Consistency Models Made Easy",
        "Geng, Zhengyang and Pokle, Ashwini and Luo, William and Lin, Justin and Kolter, J. Zico",
        2024,
        "2406.14548",
    ),
    "emd": Paper(
        "EM Distillation for One-step Diffusion Models",
        "Xie, Sirui and Xiao, Zhisheng and Kingma, Diederik P. and Hou, Tingbo and Wu, Ying Nian "
        "and Murphy, Kevin and Salimans, Tim and Poole, Ben and Gao, Ruiqi",
        2024,
        "2405.16852",
    ),
    "fd-loss": Paper(
        "Representation Fr{\\'e}chet Loss for Visual Generation",
        "Yang, Jiawei and Geng, Zhengyang and Ju, Xuan and Tian, Yonglong and Wang, Yue",
        2026,
        "2604.28190",
    ),
    "fdistill": Paper(
        "One-step Diffusion Models with f-Divergence Distribution Matching",
        "Xu, Yilun and Nie, Weili and Vahdat, Arash",
        2025,
        "2502.15681",
    ),
    "finetune": Paper(
        "Denoising Diffusion Probabilistic Models",
        "Ho, Jonathan and Jain, Ajay and Abbeel, Pieter",
        2020,
        "2006.11239",
    ),
    "flash": Paper(
        "Flash Diffusion: Accelerating Any Conditional Diffusion Model for Few Steps Image "
        "Generation",
        "Chadebec, Clément and Tasar, Onur and Benaroche, Eyal and Aubin, Benjamin",
        2024,
        "2406.02347",
    ),
    "gdd": Paper(
        "Diffusion Models Are Innate One-Step Generators",
        "Zheng, Bowen and Yang, Tianming",
        2024,
        "2405.20750",
    ),
    "gft": Paper(
        "Visual Generation Without Guidance",
        "Chen, Huayu and Jiang, Kai and Zheng, Kaiwen and Chen, Jianfei and Su, Hang and Zhu, Jun",
        2025,
        "2501.15420",
    ),
    "guided": Paper(
        "On Distillation of Guided Diffusion Models",
        "Meng, Chenlin and Rombach, Robin and Gao, Ruiqi and Kingma, Diederik P. and Ermon, "
        "Stefano and Ho, Jonathan and Salimans, Tim",
        2022,
        "2210.03142",
    ),
    "ilf": Paper(
        "Accelerate High-Quality Diffusion Models with Inner Loop Feedback",
        "Gwilliam, Matthew and Cai, Han and Wu, Di and Shrivastava, Abhinav and Cheng, Zhiyu",
        2025,
        "2501.13107",
    ),
    "imm": Paper(
        "Inductive Moment Matching",
        "Zhou, Linqi and Ermon, Stefano and Song, Jiaming",
        2025,
        "2503.07565",
    ),
    "kd": Paper(
        "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
        "Luhman, Eric and Luhman, Troy",
        2021,
        "2101.02388",
    ),
    "ladd": Paper(
        "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
        "Sauer, Axel and Boesel, Frederic and Dockhorn, Tim and Blattmann, Andreas and Esser, "
        "Patrick and Rombach, Robin",
        2024,
        "2403.12015",
    ),
    "lagrangian": Paper(
        "Flow Map Matching",
        "Boffi, Nicholas M. and Albergo, Michael S. and Vanden-Eijnden, Eric",
        2024,
        "2406.07507",
    ),
    "lcm": Paper(
        "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        "Luo, Simian and Tan, Yiqin and Huang, Longbo and Li, Jian and Zhao, Hang",
        2023,
        "2310.04378",
    ),
    "meanflow": Paper(
        "Mean Flows for One-step Generative Modeling",
        "Geng, Zhengyang and Deng, Mingyang and Bai, Xingjian and Kolter, J. Zico and He, Kaiming",
        2025,
        "2505.13447",
    ),
    "mmd": Paper(
        "Fast Inference in Denoising Diffusion Models via MMD Finetuning",
        "Aiello, Emanuele and Valsesia, Diego and Magli, Enrico",
        2023,
        "2301.07969",
    ),
    "pcm": Paper(
        "Phased Consistency Models",
        "Wang, Fu-Yun and Huang, Zhaoyang and Bergman, Alexander William and Shen, Dazhong and "
        "Gao, Peng and Lingelbach, Michael and Sun, Keqiang and Bian, Weikang and Song, Guanglu "
        "and Liu, Yu and Wang, Xiaogang and Li, Hongsheng",
        2024,
        "2405.18407",
    ),
    "progressive": Paper(
        "Progressive Distillation for Fast Sampling of Diffusion Models",
        "Salimans, Tim and Ho, Jonathan",
        2022,
        "2202.00512",
    ),
    "reflow": Paper(
        "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        "Liu, Xingchao and Gong, Chengyue and Liu, Qiang",
        2022,
        "2209.03003",
    ),
    "rg-lcd": Paper(
        "Reward Guided Latent Consistency Distillation",
        "Li, Jiachen and Feng, Weixi and Chen, Wenhu and Wang, William Yang",
        2024,
        "2403.11027",
    ),
    "scm": Paper(
        "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        "Lu, Cheng and Song, Yang",
        2024,
        "2410.11081",
    ),
    "shortcut": Paper(
        "One Step Diffusion via Shortcut Models",
        "Frans, Kevin and Hafner, Danijar and Levine, Sergey and Abbeel, Pieter",
        2024,
        "2410.12557",
    ),
    "sid": Paper(
        "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion "
        "Models for One-Step Generation",
        "Zhou, Mingyuan and Zheng, Huangjie and Wang, Zhendong and Yin, Mingzhang and Huang, Hai",
        2024,
        "2404.04057",
    ),
    "sida": Paper(
        "Adversarial Score Identity Distillation: Rapidly Surpassing the Teacher in One Step",
        "Zhou, Mingyuan and Zheng, Huangjie and Gu, Yi and Wang, Zhendong and Huang, Hai",
        2024,
        "2410.14919",
    ),
    "sim": Paper(
        "One-Step Diffusion Distillation through Score Implicit Matching",
        "Luo, Weijian and Huang, Zemin and Geng, Zhengyang and Kolter, J. Zico and Qi, Guo-jun",
        2024,
        "2410.16794",
    ),
    "snapfusion": Paper(
        "SnapFusion: Text-to-Image Diffusion Model on Mobile Devices within Two Seconds",
        "Li, Yanyu and Wang, Huan and Jin, Qing and Hu, Ju and Chemerys, Pavlo and Fu, Yun and "
        "Wang, Yanzhi and Tulyakov, Sergey and Ren, Jian",
        2023,
        "2306.00980",
    ),
    "tcd": Paper(
        "Trajectory Consistency Distillation",
        "Zheng, Jianbin and Hu, Minghui and Fan, Zhongyi and Wang, Chaoyue and Ding, Changxing and "
        "Tao, Dacheng and Cham, Tat-Jen",
        2024,
        "2402.19159",
    ),
    "tcm": Paper(
        "Truncated Consistency Models",
        "Lee, Sangyun and Xu, Yilun and Geffner, Tomas and Fanti, Giulia and Kreis, Karsten and "
        "Vahdat, Arash and Nie, Weili",
        2024,
        "2410.14895",
    ),
    "tdm": Paper(
        "Learning Few-Step Diffusion Models by Trajectory Distribution Matching",
        "Luo, Yihong and Hu, Tianyang and Sun, Jiacheng and Cai, Yujun and Tang, Jing",
        2025,
        "2503.06674",
    ),
    "tinyfusion": Paper(
        "TinyFusion: Diffusion Transformers Learned Shallow",
        "Fang, Gongfan and Li, Kunjun and Ma, Xinyin and Wang, Xinchao",
        2024,
        "2412.01199",
    ),
    "unifl": Paper(
        "UniFL: Improve Latent Diffusion Model via Unified Feedback Learning",
        "Zhang, Jiacheng and Wu, Jie and Ren, Yuxi and Xia, Xin and Kuang, Huafeng and Xie, Pan "
        "and Li, Jiashi and Xiao, Xuefeng and Huang, Weilin and Wen, Shilei and Fu, Lean and "
        "Li, Guanbin",
        2024,
        "2404.05595",
    ),
    "uni-instruct": Paper(
        "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
        "Wang, Yifei and Bai, Weimin and Zhang, Colin and Zhang, Debing and Luo, Weijian and "
        "Sun, He",
        2025,
        "2505.20755",
    ),
    "wavediff": Paper(
        "Wavelet Diffusion Models are fast and scalable Image Generators",
        "Phung, Hao and Dao, Quan and Tran, Anh",
        2022,
        "2211.16152",
    ),
}
